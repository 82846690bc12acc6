"""Find faults of a dataset before training on it (`tools/check_data.py`).

`run_checks.run_checks` checks the dataset and returns a `Report` of findings. `text_report` and `doctor_page` write it
as text, JSON and HTML; `fix` writes a corrected copy of the annotations. docs/doctor.md lists all findings.
"""
