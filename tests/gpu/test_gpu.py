"""What only a GPU shows (`make test-gpu`). Skipped without CUDA; not yet run on any."""

import math
import subprocess
import sys
import time

import pytest
import torch
import yaml
from conftest import ROOT, tiny_raw, write_coco

from detection.checkpoint import read_checkpoint
from detection.config_io import parse_config
from detection.engine.detection_task import build_trainer
from detection.engine.loop import optimizer_step, train_step
from detection.engine.resume import load_checkpoint
from detection.engine.train_detector import run_training

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.fixture()
def config(tmp_path):
    write_coco(tmp_path / "data", images=16)
    raw = tiny_raw(tmp_path / "data", tmp_path / "run")
    return parse_config({**raw, "device": "cuda"}, "test")


def losses_of(config, steps=6):
    trainer = build_trainer(config)
    trainer.objective.train()
    found = []
    batches = list(trainer.train_loader)
    for i in range(steps):
        found.append(train_step(trainer, *batches[i % len(batches)], group=1))
        optimizer_step(trainer)
    return [*found[1:], trainer.guard.flush()], trainer


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn"])
def test_half_precision_stays_finite_and_near_single(config, amp, detector):
    config = config.with_overrides([f"model.detector={detector}", "optim.lr=0.0005"])
    single, _ = losses_of(config)
    half, _ = losses_of(config.with_overrides([f"train.amp={amp}"]))
    for a, b in zip(single, half, strict=True):
        assert all(math.isfinite(value) for value in b.values())
        assert sum(b.values()) == pytest.approx(sum(a.values()), rel=0.1)


def test_the_gradient_scaler_survives_a_resume(config, tmp_path):
    config = config.with_overrides(["train.amp=fp16", "train.epochs=2"])
    assert run_training(config)
    saved = read_checkpoint(tmp_path / "run" / "last.pt")["scaler"]
    assert saved["scale"] > 0
    trainer = build_trainer(config)
    load_checkpoint(trainer, tmp_path / "run" / "last.pt")
    assert trainer.scaler.state_dict() == saved


def test_a_retinanet_step_never_makes_the_host_wait(config):
    trainer = build_trainer(config.with_overrides(["model.head_norm=group", "optim.clip_grad_norm=10"]))
    trainer.objective.train()
    batches = [batch for _ in range(2) for batch in trainer.train_loader]
    for images, targets in batches[:3]:
        train_step(trainer, images, targets, group=1)
        optimizer_step(trainer)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for images, targets in batches[3:6]:
            train_step(trainer, images, targets, group=1)
            optimizer_step(trainer)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("setting", ["train.channels_last=false", "train.compile=true"])
def test_layout_and_compiler_change_no_loss(config, setting):
    plain, _ = losses_of(config, steps=3)
    other, _ = losses_of(config.with_overrides([setting]), steps=3)
    for a, b in zip(plain, other, strict=True):
        assert sum(b.values()) == pytest.approx(sum(a.values()), rel=2e-2)


def test_a_nan_leaves_the_weights_alone(config):
    trainer = build_trainer(config.with_overrides(["train.ema=0"]))
    trainer.objective.train()
    images, targets = next(iter(trainer.train_loader))
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    plain = trainer.task.losses
    trainer.task.losses = lambda o, i, t: {name: value * math.nan for name, value in plain(o, i, t).items()}
    train_step(trainer, images, targets, group=1)
    optimizer_step(trainer)
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize("sync_bn", ["false", "true"])
def test_nccl_on_two_gpus(config, tmp_path, sync_bn):
    """Gradients through nccl; clock, stop request and predictions through gloo, without a wait for the GPU. The number
    of all-reduces per step is tested on the CPU (test_processes_wait_for_each_other_once_a_step_at_most)."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "tools/train.py"]
    done = subprocess.run(
        [*command, str(tmp_path / "config.yaml"), f"train.sync_bn={sync_bn}"],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "x 2 processes" in done.stdout


@pytest.mark.parametrize("name", ["retina_ghost", "faster_rcnn_ghost"])
def test_memory_and_speed_of_the_papers_recipes(config, name, capsys):
    """Prints; asserts only that it runs."""
    raw = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    raw["data"]["train"] = raw["data"]["val"] = config.model_dump()["data"]["train"]
    raw["data"] |= {"batch_size": 8, "workers": 4}
    raw["model"]["backbone"] |= {"weights": None}
    raw |= {"device": "cuda", "output_dir": config.output_dir}
    trainer = build_trainer(parse_config(raw, "test").with_overrides(["train.amp=bf16"]))
    trainer.objective.train()
    images, targets = next(iter(trainer.train_loader))
    for step in range(13):
        if step == 3:
            torch.cuda.synchronize()
            start = time.perf_counter()
        train_step(trainer, images, targets, group=1)
        optimizer_step(trainer)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / 10
    with capsys.disabled():
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"\n{name}: {8 / seconds:.1f} images a second at batch 8, bf16, peak {peak:.1f} GiB")
    assert seconds > 0
