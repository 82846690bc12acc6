"""Profile of the training step (--profile)."""

import itertools
import logging
import os
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from detection.config import DetectionConfig
from detection.core.errors import UserError
from detection.core.files import make_folder
from detection.core.memory import memory_advice
from detection.core.outputs import is_own, note_output
from detection.data.loader import iterate
from detection.engine.detection_task import build_trainer
from detection.engine.loop import optimizer_step, train_step
from detection.engine.run_logger import start_logging

log = logging.getLogger("detection")
PARTS = ("wait for data", "forward and backward", "optimizer and average")
TRACE = "trace.json"
MODEL_PARTS = ("assignment",)
"""Parts of the forward pass that models name: the assigner of GhostDet."""


def profile_training(config: DetectionConfig, steps: int = 10) -> str:
    """Run `steps` training steps under torch's profiler, after three warm-up steps.

    Writes `trace.json` into `output_dir` (open it in chrome://tracing or https://ui.perfetto.dev) and returns a table
    of the operations that took longest. The weights are discarded.

    Raises:
        UserError: trace.json is there and this toolkit did not write it, or it cannot be written; or as `run_training`.
    """
    trace = Path(config.output_dir) / TRACE
    if os.path.lexists(trace) and not is_own(trace):
        raise UserError(f"{trace} would be overwritten and this toolkit did not write it; give another output_dir")
    start_logging()
    with memory_advice(config):
        return _profile(config, steps)


def _profile(config: DetectionConfig, steps: int) -> str:
    trainer = build_trainer(config)
    make_folder(Path(config.output_dir), "output_dir")
    trainer.objective.train()
    batches = itertools.cycle(iterate(trainer.train_loader))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if trainer.device.type == "cuda" else [])]

    def step() -> None:
        with record_function(PARTS[0]):
            images, targets = next(batches)
        with record_function(PARTS[1]):
            train_step(trainer, images, targets, group=1)
        with record_function(PARTS[2]):
            optimizer_step(trainer)

    for _ in range(3):
        step()
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
    trace = Path(config.output_dir) / TRACE
    profiler.export_chrome_trace(str(trace))
    note_output(trace)
    by = "self_cuda_time_total" if trainer.device.type == "cuda" else "self_cpu_time_total"
    averages = profiler.key_averages()
    totals = {event.key: event.cpu_time_total for event in averages if event.key in (*PARTS, *MODEL_PARTS)}
    step_time = sum(totals[part] for part in PARTS)
    shares = ", ".join(f"{part} {totals[part] / step_time:.1%}" for part in PARTS)
    for part in (part for part in MODEL_PARTS if part in totals):
        shares += f"; {part}, in the forward pass, {totals[part] / step_time:.1%}"
    table = averages.table(sort_by=by, row_limit=25, max_name_column_width=50)
    threads = f", {torch.get_num_threads()} threads" if trainer.device.type == "cpu" else ""
    what = f"{steps} steps of {config.data.batch_size} images on {trainer.device}{threads}"
    return f"{table}\n{what}: {shares}\nall of it: {trace}"
