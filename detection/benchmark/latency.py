"""Measures the latency of detectors from uint8 images of the network's size to boxes, in several backends.

All candidates are timed in turns, so that other load on the machine affects them equally. In each turn a candidate
makes a few warm-up calls, because the others have used the caches and threads, and then a few timed ones.
"""

import importlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detection.benchmark.candidates import Candidate, DetectFn, open_candidate
from detection.benchmark.latency_report import LatencyReport, LatencyRow
from detection.benchmark.memory_growth import MemoryGrowth, peak_memory
from detection.benchmark.settings import PYTORCH, Settings
from detection.benchmark.suite import SuiteBuilder, make_batch, make_images
from detection.core.device import pick_device
from detection.core.environment import hardware, versions
from detection.core.errors import UserError
from detection.core.interleave import TURN, Clock, interleave, wall_seconds
from detection.core.progress import progress_bar

WARM_UP = 3
"""Calls before the first timed one: they prepare kernels, compile, and capture graphs."""
PACKAGES = ("torch", "torchvision", "onnxruntime", "openvino")


@dataclass
class Measurement:
    """The measurement of one candidate at one batch size.

    Attributes:
        call: runs the candidate on its images; None if it cannot run.
    """

    candidate: Candidate
    batch: int
    call: Callable[[], Any] | None = None
    seconds: list[float] = field(default_factory=list)
    boxes: float | None = None
    memory: int | None = None
    reason: str = ""

    def row(self) -> LatencyRow:
        c = self.candidate
        return LatencyRow(
            network=c.network,
            backend=c.backend,
            size=c.size,
            batch=self.batch,
            seconds=tuple(self.seconds),
            boxes=self.boxes,
            memory=self.memory,
            file_bytes=c.file_bytes(),
            parameters=c.parameters,
            macs=c.macs,
            ap=c.ap,
            reason=self.reason,
        )


def measure_latency(settings: Settings) -> LatencyReport:
    """Time all networks of `settings`.

    Raises:
        UserError: a file, a requested backend, the device or an image cannot be used.
    """
    device = pick_device(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    environment = describe_environment(settings, device)
    images = make_images(settings)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        suite = SuiteBuilder(settings, device, Path(folder), images).build()
        measurements = [Measurement(c, batch) for c in suite.candidates for batch in settings.batches]
        for measurement in measurements:
            measurement.reason = suite.failed.get(measurement.candidate, "")
        open_candidates(measurements, images)
        contention = CpuContention()
        for batch in settings.batches:
            ready = [m for m in measurements if m.batch == batch and m.call is not None]
            with progress_bar(None, f"timing, batch {batch}", len(ready) * settings.runs) as bar:
                clocks = [clock_of(m.candidate) for m in ready]
                calls = [m.call for m in ready if m.call is not None]
                for m, seconds in zip(ready, interleave(calls, settings.runs, clocks, bar.update), strict=True):
                    m.seconds = seconds
        environment["disturbance"] = contention.report()
        if settings.memory:
            suite.remarks += measure_memory([m for m in measurements if m.call is not None], images)
        # Before the temporary files are deleted.
        rows = tuple(m.row() for m in measurements)
    return LatencyReport(rows, environment, tuple(suite.remarks))


def open_candidates(measurements: Sequence[Measurement], images: Sequence[np.ndarray]) -> None:
    """Set the `call` of each measurement and warm it up; if an optional candidate cannot run, set the reason."""
    functions: dict[Candidate, DetectFn] = {}
    for measurement in progress_bar(measurements, "loading"):
        candidate = measurement.candidate
        if measurement.reason:
            continue
        try:
            if candidate not in functions:
                functions[candidate] = _with_user_errors(candidate, partial(open_candidate, candidate))
            _warm_up(measurement, functions[candidate], images)
        except UserError as error:
            if not candidate.optional:
                raise
            measurement.reason = str(error)


def _warm_up(measurement: Measurement, detect: DetectFn, images: Sequence[np.ndarray]) -> None:
    fixed = getattr(detect, "fixed_batch", None)
    if fixed not in (None, measurement.batch):
        measurement.reason = f"the file takes {fixed} image{'s' if fixed > 1 else ''} a call, not {measurement.batch}"
        return
    batch = make_batch(images, measurement.candidate.size, measurement.batch)

    def call() -> Any:
        return detect(batch)

    for _ in range(WARM_UP):
        results = _with_user_errors(measurement.candidate, call)
    measurement.call = call
    if results is not None:
        measurement.boxes = sum(len(detections["boxes"]) for detections in results) / len(results)


def _with_user_errors(candidate: Candidate, action: Callable[[], Any]) -> Any:
    """Call `action()`; turn errors of torch.compile and a lack of GPU memory into UserErrors."""
    try:
        return action()
    except torch.OutOfMemoryError:
        raise UserError(f"{candidate.network}, {candidate.backend}: out of memory; choose a smaller --batch") from None
    except (RuntimeError, ImportError, OSError) as error:
        if candidate.backend != "compile":
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{candidate.network}: torch.compile does not work here (a C++ compiler?): {reason}") from error


def clock_of(candidate: Candidate) -> Clock:
    """CUDA events for PyTorch on a GPU; wall time for other backends, whose calls return when everything is done."""
    return cuda_seconds if candidate.device != "cpu" and candidate.backend in PYTORCH else wall_seconds


def cuda_seconds(call: Callable[[], Any]) -> float:
    """GPU time of a call in seconds, synchronized before and after."""
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure_memory(measurements: Sequence[Measurement], images: Sequence[np.ndarray]) -> list[str]:
    """Set the `memory` of each measurement; each candidate runs in its own process. Returns error messages."""
    errors = []
    candidates = list(dict.fromkeys(m.candidate for m in measurements))
    for candidate in progress_bar(candidates, "memory"):
        own = sorted((m for m in measurements if m.candidate == candidate), key=lambda m: m.batch)
        try:
            peaks = peak_memory(candidate_memory, candidate, list(images), [m.batch for m in own])
        except UserError as error:
            # Not raised, to keep the latencies, which took minutes.
            errors.append(f"{candidate.network}, {candidate.backend}: memory was not measured: {error}")
            continue
        for measurement, peak in zip(own, peaks, strict=True):
            measurement.memory = peak
    return errors


def candidate_memory(candidate: Candidate, images: Sequence[np.ndarray], batches: Sequence[int]) -> list[int | None]:
    """Peak memory in bytes of running a candidate at each batch size (ascending), measured in a fresh process.

    On the CPU: the growth of the process after the imports (weights, feature maps, buffers of backends), without the
    temporary memory of loading and compiling. PyTorch on a GPU: the memory of its tensors. None if neither is known.
    """
    on_gpu = candidate.device != "cpu"
    for package in PACKAGES:
        if package.startswith(candidate.backend) or candidate.kind == "raw_onnx":
            importlib.import_module(package)
    growth = MemoryGrowth()
    detect = open_candidate(candidate)
    peaks: list[int | None] = []
    for batch in batches:
        inputs = make_batch(images, candidate.size, batch)
        for _ in range(2):
            detect(inputs)
        growth.reset_peak()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            detect(inputs)
        if on_gpu:
            peaks.append(torch.cuda.max_memory_allocated() if candidate.backend in PYTORCH else None)
        else:
            peaks.append(growth.peak())
    return peaks


class CpuContention:
    """The share of CPU time that other programs used since this object was created; known on Linux only."""

    def __init__(self) -> None:
        self.start = self._seconds()

    def fraction(self) -> float | None:
        """Fraction of the time of all cores, in [0, 1]."""
        now = self._seconds()
        if self.start is None or now is None:
            return None
        wall, busy, own = (after - before for after, before in zip(now, self.start, strict=True))
        return min(1.0, max(0.0, busy - own) / max(wall * (os.cpu_count() or 1), 1e-9))

    def report(self) -> str:
        fraction = self.fraction()
        return "not known" if fraction is None else f"other programs used {fraction:.0%} of the CPU during the timing"

    @staticmethod
    def _seconds() -> tuple[float, float, float] | None:
        """Wall time; CPU time of all programs; CPU time of this process."""
        try:
            user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split()[1:8])
        except (OSError, ValueError):
            return None
        busy = (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy, time.process_time()


def describe_environment(settings: Settings, device: torch.device) -> dict[str, str]:
    """Hardware, versions and settings that affect the results."""
    images = ", ".join(settings.images) or "drawn"
    return {
        "hardware": hardware(device),
        "threads": str(torch.get_num_threads()),
        "versions": versions(PACKAGES),
        "seed": str(settings.seed),
        "image": f"{images}, resized to the input size; times are from uint8 pixels to boxes",
        "runs": f"{settings.runs} timed calls per row, {TURN} per turn, all rows of a batch in turns",
    }
