"""What is wrong with a data set, before hours are spent on training with it; `tools/check_data.py`.

`examine.examine` reads the sets and returns a `report.Report`; console text, JSON and the HTML page are made of its
findings, and `fix` mends what can be mended for certain. Codes and remedies: docs/doctor.md.
"""
