"""The command tools/check_data.py: read a dataset, check it, print the summary, write the reports."""

from collections.abc import Sequence
from pathlib import Path

from detection.core.errors import UserError
from detection.core.outputs import check_outputs
from detection.doctor.fix import fix_report, output_paths
from detection.doctor.image_checks import default_workers
from detection.doctor.read_sets import read_sets
from detection.doctor.run_checks import Report, run_checks
from detection.doctor.text_report import format_report, write_json


def run_doctor(
    target: str,
    *,
    overrides: Sequence[str] = (),
    images: str | None = None,
    val: str | None = None,
    val_images: str | None = None,
    json_file: Path | None = None,
    html_file: Path | None = None,
    fix_file: Path | None = None,
    read_images: str = "all",
    workers: int | None = None,
    force: bool = False,
) -> Report:
    """Check a dataset, print the summary, and write the requested files; see also `read_sets` and `run_checks`.

    Args:
        json_file, html_file: write all findings to these files.
        fix_file: write a fixed copy of the annotations to this file.
        force: overwrite files that this toolkit did not write.

    Raises:
        UserError: the dataset cannot be read, or a file cannot be written.
    """
    if fix_file is not None and fix_file.suffix.lower() != ".json":
        raise UserError(f"--fix {fix_file}: the name must end in .json, since it becomes a COCO file")
    sets, config = read_sets(target, images=images, val=val, val_images=val_images, overrides=overrides)
    if fix_file is not None and config is not None and config.data.has_lists:
        raise UserError(f"--fix corrects one data set at a time; {target} has a list of them: pass one of its files")
    outputs = [file for file in (json_file, html_file) if file is not None]
    if fix_file is not None:
        outputs += [
            file for number, entries in enumerate(sets) for file in output_paths(fix_file, number, entries.split)
        ]
    inputs = [path for entries in sets for path in (entries.source, entries.folder)]
    check_outputs(outputs, [*inputs, *([target] if config is not None else [])], force=force)
    report = run_checks(
        sets,
        config,
        config_name=target if config is not None else None,
        read_images=read_images,
        workers=workers or default_workers(),
    )
    print(format_report(report), flush=True)
    if json_file is not None:
        write_json(report, json_file)
        print(f"findings: {json_file}")
    if html_file is not None:
        # matplotlib takes a second to import, and most calls write no page.
        from detection.doctor.doctor_page import write_doctor_page

        write_doctor_page(report, html_file)
        print(f"page: {html_file}")
    if fix_file is not None:
        for (path, fixed), checked in zip(fix_report(report, fix_file), report.sets, strict=True):
            print(f"\nfixed copy of {checked.original.source}: {path} (images: {checked.original.folder}); changes:")
            print(fixed.summary())
            print(f"  all changes: {path.with_suffix('.changes.json')}")
    return report
