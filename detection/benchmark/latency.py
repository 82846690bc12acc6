"""How long detectors take, whole: from uint8 images of the network's size to boxes, in several backends at once.

All contenders are timed by turns, so that whatever else the machine does hits them alike. In a turn a contender
makes one call that is not timed – the others have had caches and threads meanwhile – and a few that are.
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

from detection.benchmark.candidates import Candidate, Run, open_contender
from detection.benchmark.latency_report import LatencyReport, LatencyRow
from detection.benchmark.memory_growth import Growth, peak_memory
from detection.benchmark.settings import PYTORCH, Settings
from detection.benchmark.suite import SuiteBuilder, batch_of, make_images
from detection.core.device import pick_device
from detection.core.environment import hardware, versions
from detection.core.errors import UserError
from detection.core.interleave import TURN, Clock, interleave, wall_seconds
from detection.core.progress import progress_bar

WARM_UP = 3
"""Calls before the first timed one: they prepare kernels, compile, and record graphs."""
PACKAGES = ("torch", "torchvision", "onnxruntime", "openvino")


@dataclass
class Entry:
    """A row in the making: a contender at one batch.

    Attributes:
        call: runs it on its images; None where it cannot.
    """

    contender: Candidate
    batch: int
    call: Callable[[], Any] | None = None
    seconds: list[float] = field(default_factory=list)
    boxes: float | None = None
    memory: int | None = None
    reason: str = ""

    def row(self) -> LatencyRow:
        c = self.contender
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
    """Time everything that `settings` names.

    Raises:
        UserError: anything wrong with a file, a backend named by the user, the device or an image.
    """
    device = pick_device(settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    environment = describe(settings, device)
    images = make_images(settings)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        found = SuiteBuilder(settings, device, Path(folder), images).make()
        entries = [Entry(c, batch) for c in found.contenders for batch in settings.batches]
        for entry in entries:
            entry.reason = found.failed.get(entry.contender, "")
        open_all(entries, images)
        others = OtherPrograms()
        for batch in settings.batches:
            ready = [entry for entry in entries if entry.batch == batch and entry.call is not None]
            with progress_bar(None, f"timing, batch {batch}", len(ready) * settings.runs) as bar:
                clocks = [clock_of(entry.contender) for entry in ready]
                calls = [entry.call for entry in ready if entry.call is not None]
                for entry, seconds in zip(ready, interleave(calls, settings.runs, clocks, bar.update), strict=True):
                    entry.seconds = seconds
        environment["disturbance"] = others.report()
        if settings.memory:
            found.remarks += measure_memory([entry for entry in entries if entry.call is not None], images)
        # While the files are there.
        rows = tuple(entry.row() for entry in entries)
    return LatencyReport(rows, environment, tuple(found.remarks))


def open_all(entries: Sequence[Entry], images: Sequence[np.ndarray]) -> None:
    """Give each entry its `call` and warm it up; one that cannot run and is optional gets the reason instead."""
    runs: dict[Candidate, Run] = {}
    for entry in progress_bar(entries, "loading"):
        contender = entry.contender
        if entry.reason:
            continue
        try:
            if contender not in runs:
                runs[contender] = _told(contender, partial(open_contender, contender))
            _warm_up(entry, runs[contender], images)
        except UserError as error:
            if not contender.optional:
                raise
            entry.reason = str(error)


def _warm_up(entry: Entry, run: Run, images: Sequence[np.ndarray]) -> None:
    fixed = getattr(run, "fixed_batch", None)
    if fixed not in (None, entry.batch):
        entry.reason = f"the file takes {fixed} image{'s' if fixed > 1 else ''} a call, not {entry.batch}"
        return
    batch = batch_of(images, entry.contender.size, entry.batch)

    def call() -> Any:
        return run(batch)

    for _ in range(WARM_UP):
        found = _told(entry.contender, call)
    entry.call = call
    if found is not None:
        entry.boxes = sum(len(detections["boxes"]) for detections in found) / len(found)


def _told(contender: Candidate, action: Callable[[], Any]) -> Any:
    """`action()`; what goes wrong in torch.compile and on the device is told as the user's to mend."""
    try:
        return action()
    except torch.OutOfMemoryError:
        raise UserError(f"{contender.network}, {contender.backend}: out of memory; choose a smaller --batch") from None
    except (RuntimeError, ImportError, OSError) as error:
        if contender.backend != "compile":
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{contender.network}: torch.compile does not work here (a C++ compiler?): {reason}") from error


def clock_of(contender: Candidate) -> Clock:
    """PyTorch on a GPU is timed by the GPU's own events. Other backends return when all is done, as the CPU does."""
    return cuda_seconds if contender.device != "cpu" and contender.backend in PYTORCH else wall_seconds


def cuda_seconds(call: Callable[[], Any]) -> float:
    """From the first kernel to the last, synchronised before and after."""
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure_memory(entries: Sequence[Entry], images: Sequence[np.ndarray]) -> list[str]:
    """Set each entry's `memory`; one process for each contender does all its batches. Returns what went wrong."""
    wrong = []
    contenders = list(dict.fromkeys(entry.contender for entry in entries))
    for contender in progress_bar(contenders, "memory"):
        own = sorted((entry for entry in entries if entry.contender == contender), key=lambda entry: entry.batch)
        try:
            peaks = peak_memory(contender_memory, contender, list(images), [entry.batch for entry in own])
        except UserError as error:
            # The times, which took minutes, are there.
            wrong.append(f"{contender.network}, {contender.backend}: memory was not measured: {error}")
            continue
        for entry, peak in zip(own, peaks, strict=True):
            entry.memory = peak
    return wrong


def contender_memory(contender: Candidate, images: Sequence[np.ndarray], batches: Sequence[int]) -> list[int | None]:
    """The peak of running it at each of these ascending batches, in bytes, in this process, which has run nothing yet.

    On the CPU what the process grows by once libraries are imported: weights, maps, and what backends keep. What
    loading and compiling need for a while is left out. PyTorch on a GPU: what tensors take there. None where
    neither is known.
    """
    on_gpu = contender.device != "cpu"
    for package in PACKAGES:
        if package.startswith(contender.backend) or contender.kind == "foreign":
            importlib.import_module(package)
    growth = Growth()
    run = open_contender(contender)
    peaks: list[int | None] = []
    for batch in batches:
        inputs = batch_of(images, contender.size, batch)
        for _ in range(2):
            run(inputs)
        growth.forget_peak()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            run(inputs)
        if on_gpu:
            peaks.append(torch.cuda.max_memory_allocated() if contender.backend in PYTORCH else None)
        else:
            peaks.append(growth.peak())
    return peaks


class OtherPrograms:
    """How much of the CPU went to other programs since this was made; Linux alone tells that."""

    def __init__(self) -> None:
        self.start = self._seconds()

    def share(self) -> float | None:
        """Of the time of all cores, in [0, 1]."""
        now = self._seconds()
        if self.start is None or now is None:
            return None
        wall, busy, own = (after - before for after, before in zip(now, self.start, strict=True))
        return min(1.0, max(0.0, busy - own) / max(wall * (os.cpu_count() or 1), 1e-9))

    def report(self) -> str:
        share = self.share()
        return "not known" if share is None else f"{share:.0%} of the CPU went to other programs while it was timed"

    @staticmethod
    def _seconds() -> tuple[float, float, float] | None:
        """Now; of the CPU used by all programs, by this one."""
        try:
            user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split()[1:8])
        except (OSError, ValueError):
            return None
        busy = (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy, time.process_time()


def describe(settings: Settings, device: torch.device) -> dict[str, str]:
    """What has to be known to judge the numbers."""
    images = ", ".join(settings.images) or "drawn"
    return {
        "hardware": hardware(device),
        "threads": str(torch.get_num_threads()),
        "versions": versions(PACKAGES),
        "seed": str(settings.seed),
        "image": f"{images}, squeezed to the input's size; times are from uint8 pixels to boxes",
        "runs": f"{settings.runs} timed calls a row, {TURN} at a turn, all rows of a batch by turns",
    }
