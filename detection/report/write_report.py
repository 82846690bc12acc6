"""Write the report of a run, or of a file of detections: an HTML page, and its numbers as JSON."""

import json
import logging
import time
from pathlib import Path
from typing import Any

from detection.benchmark.latency import measure_latency
from detection.benchmark.latency_report import LatencyReport
from detection.benchmark.settings import CHECKPOINTS, Settings
from detection.core.commands import command
from detection.core.environment import describe_environment
from detection.core.errors import UserError
from detection.core.html import write_page
from detection.core.outputs import write_output
from detection.evaluation.analyze import clean
from detection.report.run_data import RunData, read_run
from detection.report.run_page import run_sections

log = logging.getLogger("detection")
FORMAT = "ghostnet-detection/report/1"
MAX_BYTES = 6_000_000
"""Limit of the images of a page."""
LATENCY_RUNS = 10


def write_report(
    source: RunData,
    out: str | Path,
    *,
    latency: bool = True,
    max_bytes: int = MAX_BYTES,
) -> Path:
    """Write the page `out`, and its numbers beside it with the suffix .json; returns the path of the JSON file.

    Args:
        latency: measure the latency of the checkpoint, if there is one; takes some seconds.
        max_bytes: limit of all images of the page together.

    Raises:
        UserError: a file cannot be written.
    """
    out = checked_page_path(out)
    environment = describe_environment() if source.config is None else describe_environment(source.config.device)
    measured = _measure_latency(source) if latency else None
    sections = run_sections(source, environment, measured, max_bytes=max_bytes)
    title = f"Report: {source.name}"
    write_page(out, title, sections, subtitle=_subtitle(source), footer=footer(environment))
    content: dict[str, Any] = {
        "format": FORMAT,
        "run": source.name,
        "data": source.annotations.source,
        "detections": source.detections_source,
        **source.analysis.to_json(),
        "history": source.history,
        "latency": None if measured is None else [_latency_json(row) for row in measured.rows],
        "environment": environment,
        "trained_with": source.trained_with,
        "config": None if source.config is None else source.config.model_dump(),
    }
    return write_json(out, content)


def report_on_training(folder: Path) -> None:
    """Write report.html and report.json at the end of training. Any error becomes a warning."""
    start = time.monotonic()
    try:
        write_report(read_run(folder, detect=False), folder / "report.html")
    except Exception as error:
        # The training has succeeded; no error in its report may make it look like a failure.
        log.warning("the report could not be written: %s; to try again, run %s %s", error, command("report"), folder)
        log.debug("", exc_info=True)
    else:
        log.info("report written in %.0f s: %s", time.monotonic() - start, folder / "report.html")


def _measure_latency(source: RunData) -> LatencyReport | None:
    """Measure the latency of the checkpoint in PyTorch; None if there is no checkpoint or the measurement fails."""
    if source.checkpoint is None or source.config is None or source.checkpoint.suffix not in CHECKPOINTS:
        return None
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
        log.warning("the latency was not measured: %s", error)
        return None


def write_json(page: Path, content: dict[str, Any]) -> Path:
    """Write the numbers of a page beside it; returns the path."""
    path = json_path(page)
    text = json.dumps(clean(content), indent=1, allow_nan=False)
    write_output(path, lambda file: file.write(text.encode()))
    return path


def json_path(page: Path) -> Path:
    """Path of the numbers of a page."""
    return page.with_suffix(".json")


def checked_page_path(out: str | Path) -> Path:
    """The path of a page. Raises UserError if the suffix is not .html or the folder does not exist."""
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {out}: the name must end in .html; the numbers are written beside it, in .json")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist")
    return out


def footer(environment: dict[str, str]) -> str:
    """Date and commit of a page."""
    return f"Written {environment['date']} by {command('report')}, commit {environment['commit']}; see docs/report.md."


def _subtitle(source: RunData) -> str:
    if source.config is None:
        return source.detections_source
    model = source.config.model
    return (
        f"{model.detector} on {model.backbone.name} {model.backbone.width:g}, {source.config.data.short_side} px; "
        f"{source.checkpoint or source.folder}"
    )


def _latency_json(row: Any) -> dict[str, Any]:
    names = ("backend", "size", "median", "p95", "throughput", "parameters", "macs", "file_bytes")
    return {name: getattr(row, name) for name in names}
