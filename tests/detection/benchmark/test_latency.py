"""Latency of detectors: the measurement, its table and its plot."""

import csv
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_seed

from detection import UserError, build_model
from detection.benchmark import cuda_graph, latency
from detection.benchmark.cuda_graph import GraphedCall, capture_graphs
from detection.benchmark.latency import cuda_seconds
from detection.benchmark.latency_plot import check_plot, plot_latency, plotted_rows
from detection.benchmark.latency_report import LatencyReport, LatencyRow
from detection.benchmark.memory_growth import MemoryGrowth, peak_memory
from detection.benchmark.settings import Settings
from detection.core import interleave as interleave_module
from detection.core.interleave import interleave

SMALL = str(ROOT / "configs/retina_ghost_320.yaml")


def row(network="a.pt", backend="eager", batch=1, seconds=(0.02, 0.01, 0.03), **others) -> LatencyRow:
    return LatencyRow(network, backend, (64, 96), batch, tuple(seconds), **others)


def timed(seconds, batch=2) -> LatencyRow:
    return row(batch=batch, seconds=seconds)


# ---- the numbers


def test_row_statistics():
    found = timed([0.010 + 0.001 * i for i in range(21)])
    assert found.median == pytest.approx(0.020)
    assert found.p95 == pytest.approx(0.029)
    assert found.throughput == pytest.approx(2 / 0.020)
    alone = timed([0.5])
    assert alone.median == alone.p95 == 0.5
    never = timed([])
    assert (never.median, never.p95, never.throughput) == (None, None, None)


def test_speedup_is_relative_to_the_first_measured_row_of_the_batch():
    rows = (
        row(seconds=(), reason="broken"),
        row("b", seconds=[0.02]),
        row("b", seconds=[0.4], batch=8),
        row("c", seconds=[0.01]),
        row("c", seconds=[0.8], batch=8),
    )
    assert LatencyReport(rows, {}).speedups() == [None, 1.0, 1.0, 2.0, 0.5]


def test_formats():
    environment = {"hardware": "a chip, 2 cores", "threads": "2"}
    rows = (
        row(boxes=3.0, memory=50_000_000, file_bytes=12_800_000, parameters=3_510_000, macs=1_910_000_000, ap=0.502),
        row("b.onnx", "onnxruntime", seconds=(0.005,)),
        row("a.pt", "openvino", seconds=(), reason="needs OpenVINO: pip install -e '.[openvino]'"),
    )
    report = LatencyReport(rows, environment, ("random weights: none",))
    text = report.format("text")
    above, table, below = text.split("\n\n")
    assert above.splitlines()[0].split() == ["hardware", "a", "chip,", "2", "cores"]
    lines = table.splitlines()
    assert lines[1].split() == "a.pt eager 64x96 1 20.0 29.0 50.0 1.00 3 50 12.8 3.51 1.91 0.502".split()
    assert lines[2].split() == "b.onnx onnxruntime 64x96 1 5.00 5.00 200.0 4.00 – – – – – –".split()
    assert below.splitlines()[0] == "random weights: none"
    assert below.splitlines()[1] == "a.pt, openvino: not measured: needs OpenVINO: pip install -e '.[openvino]'"
    markdown = report.format("markdown").splitlines()
    assert markdown[0] == "* hardware: a chip, 2 cores"
    assert markdown[4].startswith("| --- | --- | --- | ---: |") and markdown[5].startswith(
        "| a.pt | eager | 64x96 | 1 |"
    )
    first, second, third = csv.DictReader(report.format("csv").splitlines())
    assert float(first["median_s"]) == 0.02 and first["memory_bytes"] == "50000000" and first["threads"] == "2"
    assert float(second["images_per_s"]) == 200 and float(second["times_as_fast"]) == 4 and second["ap"] == ""
    assert third["median_s"] == "" and third["runs"] == "0" and "openvino" in third["not_measured_because"]


def test_empty_columns_are_left_out():
    header = LatencyReport((row(),), {}).format("text").splitlines()[0]
    assert "median (ms)" in header and "AP" not in header and "memory" not in header


# ---- measuring


def test_candidates_are_interleaved(monkeypatch):
    """Noise affects all candidates equally: calls are interleaved, and the order changes from round to round."""
    monkeypatch.setattr(interleave_module, "TURN", 2)
    log: list[str] = []
    told: list[int] = []
    seconds = interleave([lambda name=name: log.append(name) for name in "abc"], 5, progress=told.append)
    assert [len(own) for own in seconds] == [5, 5, 5] and sum(told) == 15
    # Some calls before each turn are not timed.
    turns = ("abc", 2), ("bca", 2), ("cab", 1)
    assert "".join(log) == "".join(
        name * (interleave_module.WARM_CALLS + timed) for names, timed in turns for name in names
    )


def test_timing_in_seconds():
    (seconds,) = interleave([lambda: latency.time.sleep(0.02)], 2)
    assert all(0.02 <= own < 0.5 for own in seconds)


def test_gpu_timing_uses_cuda_events(monkeypatch):
    """A CPU version of the GPU timing: recorded events and synchronization."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.name = f"event {sum(line.startswith('new') for line in log)}"
            log.append(f"new {self.name}")

        def record(self):
            log.append(f"record {self.name}")

        def synchronize(self):
            log.append(f"wait for {self.name}")

        def elapsed_time(self, end):
            return 12.5 if (self.name, end.name) == ("event 0", "event 1") else -1

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    assert cuda_seconds(lambda: log.append("call")) == 0.0125
    assert [line for line in log if not line.startswith("new")] == [
        "synchronize", "record event 0", "call", "record event 1", "wait for event 1",
    ]  # fmt: skip
    on_gpu = SimpleNamespace(device="cuda:0", backend="eager")
    assert latency.clock_of(on_gpu) is cuda_seconds
    assert latency.clock_of(SimpleNamespace(device="cuda:0", backend="onnxruntime")) is latency.wall_seconds


def capture_on_cpu(call):
    """A stand-in for a CUDA graph: a replay computes the same output tensors from the static inputs again."""
    output = call()

    def tensors(structure):
        if isinstance(structure, torch.Tensor):
            return [structure]
        values = structure.values() if isinstance(structure, dict) else structure
        return [tensor for value in values for tensor in tensors(value)]

    def replay():
        for slot, new in zip(tensors(output), tensors(call()), strict=True):
            slot.copy_(new)

    return replay, output


@pytest.mark.numeric
def test_captured_call_is_replayed_for_each_shape():
    captured = []
    graphed = GraphedCall(
        lambda x: {"double": 2 * x[0], "sum": x[0] + x[1]}, lambda c: captured.append(c) or capture_on_cpu(c)
    )
    for shape in ((2, 3), (4, 5), (2, 3)):
        one, other = torch.randn(shape), torch.randn(shape)
        output = graphed([one, other])
        assert torch.equal(output["double"], 2 * one) and torch.equal(output["sum"], one + other)
    assert len(captured) == 2
    single = GraphedCall(lambda x: x + 1, capture_on_cpu)
    assert single(torch.zeros(2)).tolist() == [1, 1] and single(torch.ones(2)).tolist() == [2, 2]


@pytest.mark.numeric
@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn", "ghostdet"])
def test_captured_parts_give_the_same_detections(tiny_config, monkeypatch, detector):
    """A CPU version of the backend cuda_graph."""
    config = tiny_config.with_overrides([f"model.detector={detector}", "eval.score_threshold=0"])
    torch.manual_seed(run_seed())
    model = build_model(config, 2).eval()
    images = [[torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)] for _ in range(2)]
    with torch.inference_mode():
        expected = [model(image)[0] for image in images]
        monkeypatch.setattr(cuda_graph, "capture_cuda", capture_on_cpu)
        capture_graphs(model)
        # The first image once more: recorded outputs were overwritten by the second.
        found = [model(image)[0] for image in (*images, images[0])]
    for one, other in zip(found, (*expected, expected[0]), strict=True):
        assert len(one["boxes"]) > 0
        for name in one:
            assert torch.equal(one[name], other[name])


def test_cpu_contention(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    # Ten seconds; the machine was busy for eight of twenty, five of them with this program.
    readings = iter([(100.0, 50.0, 7.0), (110.0, 58.0, 12.0), (100.0, 50.0, 7.0), None])
    monkeypatch.setattr(latency.CpuContention, "_seconds", staticmethod(lambda: next(readings)))
    assert latency.CpuContention().fraction() == pytest.approx(3 / 20)
    assert latency.CpuContention().report() == "not known"


# ---- memory


def hold(megabytes: int) -> list[int | None]:
    growth = MemoryGrowth()
    given_back = np.ones(80_000_000, np.uint8)
    del given_back
    growth.reset_peak()
    held = np.ones(megabytes * 1_000_000, np.uint8)
    return [growth.peak(), int(held[-1])]


def fail() -> list[int | None]:
    raise UserError("no such luck")


def die() -> list[int | None]:
    os._exit(9)


def test_memory_of_a_fresh_process():
    peak, _ = peak_memory(hold, 40)
    assert 38e6 < peak < 70e6
    with pytest.raises(UserError, match="no such luck"):
        peak_memory(fail)
    with pytest.raises(UserError, match="ended with code 9"):
        peak_memory(die)


# ---- the image


def test_plot(tmp_path):
    rows = (
        row("a.pt", "eager", seconds=[0.03], ap=0.5),
        row("a.pt", "eager", seconds=[0.2], ap=0.5, batch=8),
        row("a.pt", "onnxruntime", seconds=[0.008], ap=0.5),
        row("b.pt", seconds=[0.05]),
        row("c.pt", seconds=(), ap=0.3, reason="broken"),
    )
    assert plotted_rows(rows) == [rows[0], rows[2]]
    report = LatencyReport(rows, {"hardware": "a chip", "threads": "2"})
    plot_latency(report, tmp_path / "x.svg")
    assert (tmp_path / "x.svg").read_text().startswith("<?xml")
    plot_latency(report, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="--plot needs an AP"):
        plot_latency(LatencyReport(rows[3:], {}), tmp_path / "x.png")


def test_plot_mistakes_are_reported_before_measuring(tmp_path):
    settings = Settings((SMALL,), aps={SMALL: 0.5})
    with pytest.raises(UserError, match=r"must end in \.png"):
        check_plot(tmp_path / "x.jpeg", settings)
    with pytest.raises(UserError, match="there is no folder"):
        check_plot(tmp_path / "no" / "x.png", settings)
    with pytest.raises(UserError, match="--plot needs an AP"):
        check_plot(tmp_path / "x.png", Settings((SMALL,)))
