"""What tools/check_data.py does: read, examine, tell, write."""

import os
from collections.abc import Sequence
from pathlib import Path

from detection.doctor.examine import Report, examine
from detection.doctor.fix import fix_report
from detection.doctor.pictures import default_workers
from detection.doctor.read import read_sets
from detection.doctor.report import console, write_json
from detection.errors import UserError
from detection.files import make_folder


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
    pictures: str = "all",
    workers: int | None = None,
) -> Report:
    """Examine, print the summary, and write what is asked for; see `read_sets` and `examine`.

    Raises:
        UserError: what cannot be read at all, or written.
    """
    for file in (json_file, html_file, fix_file):
        if file is not None:
            make_folder(file.parent, "the folder of the output")
    sets, config = read_sets(target, images=images, val=val, val_images=val_images, overrides=overrides)
    if fix_file is not None:
        _keep_sources(fix_file, [raw.source for raw in sets])
    report = examine(
        sets,
        config,
        config_name=target if config is not None else None,
        pictures=pictures,
        workers=workers or default_workers(),
    )
    print(console(report), flush=True)
    if json_file is not None:
        write_json(report, json_file)
        print(f"findings: {json_file}")
    if html_file is not None:
        # matplotlib takes a second to import.
        from detection.doctor.page import write_doctor_page

        write_doctor_page(report, html_file)
        print(f"page: {html_file}")
    if fix_file is not None:
        for (path, mended), checked in zip(fix_report(report, fix_file), report.sets, strict=True):
            print(f"\nmended copy of {checked.raw.source}: {path} (pictures: {checked.raw.folder}); changes:")
            print(mended.summary())
            print(f"  all of them: {path.with_suffix('.changes.json')}")
    return report


def _keep_sources(out: Path, sources: Sequence[str]) -> None:
    """Nothing is changed in place."""
    if out.suffix.lower() != ".json":
        raise UserError(f"--fix {out}: the name must end in .json, it becomes a COCO file")
    copies = [out, out.with_name(f"{out.stem}_val{out.suffix}"), out.with_suffix(".changes.json")]
    for source in sources:
        for copy in copies:
            if os.path.exists(source) and os.path.exists(copy) and os.path.samefile(source, copy):
                raise UserError(f"--fix {out} would overwrite {source}; name another file")
