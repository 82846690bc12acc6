"""Write the report on a run, or on a file of detections: one page, and its numbers beside it."""

import json
import logging
import time
from pathlib import Path
from typing import Any

from detection.benchmark.latency_report import LatencyReport
from detection.core.environment import describe_environment
from detection.core.errors import UserError
from detection.core.html import write_page
from detection.core.outputs import write_output
from detection.evaluation.analyze import clean
from detection.report.run_data import Source, read_run
from detection.report.run_page import run_sections

log = logging.getLogger("detection")
FORMAT = "ghostnet-detection/report/1"
MAX_BYTES = 6_000_000
"""Of the images of a page."""
LATENCY_RUNS = 10


def write_report(
    source: Source,
    out: str | Path,
    *,
    latency: bool = True,
    max_bytes: int = MAX_BYTES,
) -> Path:
    """Write the page `out`, and its numbers beside it (.json in the place of .html); returns the latter's path.

    Args:
        latency: time the checkpoint, if there is one, which takes some seconds.
        max_bytes: of all images together.

    Raises:
        UserError: a file cannot be written.
    """
    out = output_path(out)
    environment = describe_environment() if source.config is None else describe_environment(source.config.device)
    measured = measure(source) if latency else None
    sections = run_sections(source, environment, measured, max_bytes=max_bytes)
    title = f"Report on {source.name}"
    write_page(out, title, sections, subtitle=_subtitle(source), footer=footer(environment))
    content: dict[str, Any] = {
        "format": FORMAT,
        "run": source.name,
        "data": source.index.source,
        "detections": source.came_from,
        **source.analysis.to_json(),
        "history": source.history,
        "latency": None if measured is None else [_latency_json(row) for row in measured.rows],
        "environment": environment,
        "trained_with": source.trained_with,
        "config": None if source.config is None else source.config.model_dump(),
    }
    return write_json(out, content)


def report_on_training(folder: Path) -> None:
    """Write report.html and report.json of a run that has just ended. Whatever goes wrong is a warning, no more."""
    start = time.monotonic()
    try:
        write_report(read_run(folder, detect=False), folder / "report.html")
    except Exception as error:
        # The run is done and safe, and took hours: nothing that happens here may look like its failure.
        log.warning("the report could not be written: %s; python tools/report.py %s tries again", error, folder)
        log.debug("", exc_info=True)
    else:
        log.info("report written in %.0f s: %s", time.monotonic() - start, folder / "report.html")


def measure(source: Source) -> LatencyReport | None:
    """Time the checkpoint as PyTorch runs it; None where there is none, or it cannot be."""
    if source.checkpoint is None or source.config is None or source.checkpoint.suffix not in (".pt", ".pth"):
        return None
    from detection.benchmark.latency import measure_latency
    from detection.benchmark.settings import Settings

    try:
        return measure_latency(
            Settings(
                targets=(str(source.checkpoint),),
                backends=("eager",),
                runs=LATENCY_RUNS,
                device=source.config.device,
                memory=False,
            )
        )
    except UserError as error:
        log.warning("the speed was not measured: %s", error)
        return None


def write_json(page: Path, content: dict[str, Any]) -> Path:
    """Numbers beside a page."""
    path = numbers_path(page)
    text = json.dumps(clean(content), indent=1, allow_nan=False)
    write_output(path, lambda file: file.write(text.encode()))
    return path


def numbers_path(page: Path) -> Path:
    """Where the numbers of a page go."""
    return page.with_suffix(".json")


def output_path(out: str | Path) -> Path:
    """Raises UserError where a page cannot be written there."""
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {out}: the name must end in .html; the numbers are written beside it, in .json")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    return out


def footer(environment: dict[str, str]) -> str:
    return f"Written {environment['date']} by tools/report.py, commit {environment['commit']}; see docs/report.md."


def _subtitle(source: Source) -> str:
    if source.config is None:
        return source.came_from
    model = source.config.model
    return (
        f"{model.detector} on {model.backbone.name} {model.backbone.width:g}, {source.config.data.short_side} px; "
        f"{source.checkpoint or source.folder}"
    )


def _latency_json(row: Any) -> dict[str, Any]:
    names = ("backend", "size", "median", "p95", "throughput", "parameters", "macs", "file_bytes")
    return {name: getattr(row, name) for name in names}
