"""A detector trained by two processes under torchrun; the classifier's test is in test_pretraining.py."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, run_seed, tiny_raw, write_coco
from processes import ToolProcess
from small_sets import write_part

from backbones import build_backbone
from detection import UserError
from detection.checkpoint import read_checkpoint
from detection.config_io import load_config
from detection.core import distributed
from detection.core.outputs import is_own
from detection.engine.detection_task import build_trainer


def torchrun(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )


def as_torchrun_starts_it(folder: Path, *arguments: object) -> None:
    """Two processes of tools/train.py with the variables that torchrun sets, without its seconds of imports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    processes = [
        ToolProcess(
            "train",
            arguments,
            folder / f"out{rank}.txt",
            folder / f"err{rank}.txt",
            environment={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            assert process.wait(200) and process.completed().returncode == 0, process.completed()
    finally:
        for process in processes:
            if process.running():
                process.send(signal.SIGKILL)


def test_one_process_needs_no_ceremony():
    with distributed.session("cpu") as device:
        assert device == torch.device("cpu")
        assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
        assert distributed.gather("x") == ["x"] and distributed.reduce_sum([1, 2]) == [1, 2]
        module = torch.nn.Linear(1, 1)
        assert distributed.parallel(module, device) is module
        distributed.barrier()
    with pytest.raises(UserError), distributed.session("cuda:99"):
        pass


@pytest.mark.numeric
@pytest.mark.slow
def test_a_detector_trains_on_two_processes_and_resumes(tmp_path, tool):
    write_coco(tmp_path / "data", images=14)
    raw = tiny_raw(tmp_path / "data", tmp_path / "run")
    raw["data"] |= {"batch_size": 2, "workers": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    done = torchrun("tools/train.py", tmp_path / "config.yaml", "train.epochs=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("TRAINING FROM SCRATCH") == 1 and "x 2 processes" in done.stdout
    done = torchrun("tools/train.py", tmp_path / "config.yaml", "train.epochs=3", "--resume")
    assert done.returncode == 0 and done.stdout.count("resumed after epoch 2") == 1, done.stdout + done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [1, 2, 3]
    assert records[-1]["step"] == 9  # 14 images, 4 a step, two sit out
    assert len(read_checkpoint(tmp_path / "run" / "last.pt")["rng"]) == 2

    # The shares of both make up the evaluation of one process.
    done = tool("evaluate", tmp_path / "run" / "best.pt", "--json", tmp_path / "numbers.json", "data.workers=0")
    assert done.returncode == 0, done.stderr
    best = max(record["AP"] for record in records)
    assert json.loads((tmp_path / "numbers.json").read_text())["AP"] == pytest.approx(best, abs=1e-3)


@pytest.mark.numeric
@pytest.mark.parametrize(
    "accumulate, sets", [(1, 1), pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(1, 2, marks=pytest.mark.slow)]
)
def test_two_processes_train_as_one_does_with_the_same_global_batch(tmp_path, tool, accumulate, sets):
    """Twenty steps end at the same weights, losses and AP. Batch norms are frozen: each process has its own half of the
    batch, which SyncBatchNorm (CUDA alone) would put together.

    Sums in another order differ in the last digit. That stays below 1e-4 of the way that the weights went, until the
    edge of a box comes to lie within that digit of its object's: there GIoU has a kink, and the gradient may take
    either side (5e-3 was seen). A share of the batch that counts double or not at all would be of the order of 1.
    """
    write_coco(tmp_path / "data", images=8)
    torch.manual_seed(run_seed())
    pretrained = build_backbone("ghostnet", width=0.5).state_dict()
    for key, value in pretrained.items():
        if key.endswith(("bn1.weight", ".1.weight")):
            torch.nn.init.uniform_(value, 0.5, 1.5)
    torch.save(pretrained, tmp_path / "backbone.pth")
    raw = tiny_raw(tmp_path / "data", tmp_path / "one")
    raw["model"]["backbone"] |= {"weights": str(tmp_path / "backbone.pth"), "freeze_bn": True}
    if sets == 2:  # three images of the first in each epoch, and five of the second
        halves = ("disc", slice(0, None, 2), 0.75), ("square", slice(1, None, 2), 1.25)
        raw["data"]["train"] = [
            {"annotations": write_part(tmp_path / "data", f"{name}s", [name], half), "weight": weight}
            for name, half, weight in halves
        ]
    batch = 4 // accumulate
    raw["data"] |= {"batch_size": batch, "augment": {"scale": [0.8, 1.2], "mosaic": 0.3}}
    # Slow steps: fast ones let the last digit, in which sums of another order differ, grow a hundredfold in five steps.
    raw["optim"] = {"name": "sgd", "lr": 0.003, "lr_reference_batch": 4, "warmup_steps": 2, "clip_grad_norm": 10}
    raw["train"] = {"epochs": 10, "ema": 0.9, "eval_every": 5, "accumulate": accumulate}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    assert tool("train", tmp_path / "config.yaml").returncode == 0
    as_torchrun_starts_it(
        tmp_path, tmp_path / "config.yaml", f"data.batch_size={batch // 2}", f"output_dir={tmp_path / 'two'}"
    )
    one, two = (read_checkpoint(tmp_path / name / "last.pt") for name in ("one", "two"))
    assert one["progress"]["step"] == two["progress"]["step"] == 20
    begin = build_trainer(load_config(tmp_path / "config.yaml")).model.state_dict()
    way, apart = (
        sum(float((a[key] - b[key]).square().sum()) for key in begin if begin[key].is_floating_point()) ** 0.5
        for a, b in ((one["ema"], begin), (one["ema"], two["ema"]))
    )
    assert apart < 0.02 * way
    records = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for first, second in zip(*records, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=3e-3)
        assert second["AP"] == pytest.approx(first["AP"], abs=0.01)


COUNT_COLLECTIVES = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from detection.config_io import load_config
from detection.core import distributed
from detection.engine.detection_task import build_trainer
from detection.engine.loop import train_epoch
from detection.engine.run_logger import RunLogger
from detection.engine.signals import StopSignal

calls, all_reduce = [], dist.all_reduce

def counted(*args, async_op=False, **options):
    calls.append("async" if async_op else "wait")
    return all_reduce(*args, async_op=async_op, **options)

def at_batch(trainer, number, rank, change):
    # Let `change` have the losses of one batch of one rank.
    batches, losses = [], trainer.task.losses

    def changed(*args):
        batches.append(1)
        found = losses(*args)
        return change(found) if len(batches) == number and distributed.rank() == rank else found

    trainer.task.losses = changed

def request_stop(losses):
    stop.requested = True
    return losses

with distributed.session("cpu") as device:
    config, dist.all_reduce = load_config(sys.argv[1]), counted
    logger = RunLogger(Path(config.output_dir), 0)

    # One all-reduce a step, which nobody waits for; the request of one rank stops both, one step later.
    trainer, stop = build_trainer(config, device), StopSignal()
    trainer.sync_clock_and_stop(stop)
    calls.clear()
    at_batch(trainer, 3, 1, request_stop)
    train_epoch(trainer, logger, stop)
    progress = trainer.progress
    assert calls == ["async"] * 3 and (progress.step, progress.batch) == (3, 6), (calls, progress)
    assert trainer.sync_clock_and_stop(stop)
    assert len(set(distributed.gather(trainer.seconds()))) == 1
    stop.requested = False
    calls.clear()
    train_epoch(trainer, logger, stop)
    assert calls == ["async", "wait"] and trainer.progress.epoch == 1, "at the end of the epoch also the sum of losses"

    # With non_finite=skip ranks also share, once a step, whether to skip it.
    trainer = build_trainer(config.with_overrides(["train.non_finite=skip"]), device)
    calls.clear()
    at_batch(trainer, 3, 0, lambda losses: {name: loss * torch.nan for name, loss in losses.items()})
    train_epoch(trainer, logger, stop)
    assert calls == ["wait", "async"] * 4 + ["wait"] and trainer.progress.step == 3, (calls, trainer.progress)
    sums = distributed.gather([float(p.double().sum()) for p in trainer.model.parameters()])
    assert sums[0] == sums[1] and all(torch.isfinite(p).all() for p in trainer.model.parameters())
"""


@pytest.mark.numeric
def test_processes_wait_for_each_other_once_a_step_at_most(tmp_path):
    """On the CPU, with gloo, which carries the same numbers between processes with GPUs (tests/gpu)."""
    write_coco(tmp_path / "data", images=14)
    raw = tiny_raw(tmp_path / "data", tmp_path / "run")
    raw["data"] |= {"batch_size": 1, "workers": 0}
    raw["train"]["accumulate"] = 2
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    (tmp_path / "run").mkdir()
    (tmp_path / "worker.py").write_text(COUNT_COLLECTIVES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    workers = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "worker.py"), str(tmp_path / "config.yaml")],
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [worker.communicate(timeout=240)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)


@pytest.mark.numeric
@pytest.mark.slow
def test_two_processes_share_detection_and_evaluation(tmp_path, trained, tool):
    source = trained.parent / "data"
    one = tool("detect", trained / "best.pt", source / "images", "--out", tmp_path / "one", "--device", "cpu")
    two = torchrun(
        "tools/detect.py", trained / "best.pt", source / "images", "--out", tmp_path / "two", "--device", "cpu"
    )
    assert one.returncode == two.returncode == 0, two.stderr
    assert one.stdout.splitlines()[0] == two.stdout.splitlines()[0]
    names = sorted(path.name for path in (tmp_path / "one").glob("[!.]*"))
    assert names == sorted(path.name for path in (tmp_path / "two").glob("[!.]*")) and len(names) == 24
    assert all(is_own(tmp_path / folder / name) for folder in ("one", "two") for name in names)
    again = torchrun(
        "tools/detect.py",
        trained / "best.pt",
        source / "images",
        "--out",
        tmp_path / "two",
        "--device",
        "cpu",
        "--resume",
    )
    assert "nothing done" in again.stdout and "12 were done before" in again.stdout

    arguments = ["data.workers=0", "--save-predictions", tmp_path / "found.json", "--json", tmp_path / "two.json"]
    done = torchrun("tools/evaluate.py", trained / "best.pt", *arguments)
    assert done.returncode == 0, done.stderr
    assert tool("evaluate", trained / "best.pt", *arguments[:-1], tmp_path / "one.json").returncode == 0
    numbers = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two")]
    assert numbers[1]["AP"] == pytest.approx(numbers[0]["AP"], abs=1e-6)
    assert not list(tmp_path.glob("found.json.part*"))
