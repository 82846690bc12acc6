"""Memory that runs out: every kind of it is told alike, with what to change."""

import errno
import multiprocessing
import os
import resource

import pytest
import torch

from detection import UserError
from detection.cli.run_tool import run_tool
from detection.core import memory
from detection.core.memory import available_memory, is_out_of_memory, memory_advice
from detection.data.dataset import build_dataset
from detection.data.loader import build_loader, iterate
from detection.data.sampler import EvalBatchSampler
from detection.engine import profile
from detection.engine import train_detector as training
from detection.evaluation import score
from detection.pretraining import classification_task as pretraining

ERRORS = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: not enough memory: you tried"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("could not create a primitive"),
    RuntimeError("can't start new thread"),
    RuntimeError("unable to mmap 589824 bytes from file <filename not specified>: Cannot allocate memory (12)"),
    RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback\ncan't allocate memory: you"),
    OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    ImportError("libtorch_cuda.so: failed to map segment from shared object"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: str(error)[:40])
def test_errors_that_tell_of_memory(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ValueError("bad_alloc"), OSError(28, "No space left")]
)
def test_other_errors_stay_what_they_are(tiny_config, error):
    with pytest.raises(type(error)) as raised, memory_advice(tiny_config):
        raise error
    assert raised.value is error


def test_what_to_lower(tiny_config, tmp_path):
    def advice(*overrides, **options):
        with pytest.raises(UserError) as error, memory_advice(tiny_config.with_overrides(overrides), **options):
            raise MemoryError
        return str(error.value)

    (tmp_path / "last.pt").touch()
    text = advice("data.workers=2", checkpoint=tmp_path / "last.pt")
    for word in (
        "with 4 images a batch",
        "data.batch_size=2 train.accumulate=2",
        "data.workers=1",
        "last.pt (--resume)",
    ):
        assert word in text
    text = advice("data.batch_size=1", checkpoint=tmp_path / "absent")
    assert "batch_size=" not in text and "workers" not in text and "resume" not in text and "data.short_side=72" in text
    assert "eval.batch_size=2;" in advice(training=False)


@pytest.mark.parametrize("module, call", [
    (training, lambda config: training.dry_run(config)),
    (pretraining, lambda config: pretraining.dry_run(config)),
    (profile, lambda config: profile.profile_training(config)),
    (training, lambda config: training.run_training(config)),
])  # fmt: skip
def test_dry_run_profile_and_training_give_the_same_advice(tiny_config, tmp_path, monkeypatch, module, call):
    def build(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 12 bytes")

    monkeypatch.setattr(module, "build_trainer", build)
    with pytest.raises(UserError, match=r"out of memory on cpu with 4 images a batch .*data\.batch_size=2"):
        call(tiny_config)
    assert not (tmp_path / "run").exists()


def test_an_evaluation_gives_advice(trained, tmp_path, monkeypatch):
    def detect(*_, **__):
        raise MemoryError

    monkeypatch.setattr(score, "detect_batches", detect)
    with pytest.raises(UserError, match=r"out of memory on cpu .*eval\.batch_size=2"):
        score.score_checkpoint(trained / "best.pt", predictions_file=str(tmp_path / "p.json"))


def test_a_worker_that_cannot_hand_over_its_batch_is_no_hang(tiny_config, monkeypatch):
    """What fails in the thread that pickles batches would be printed and dropped, and the batch waited for for ever."""

    class Heavy(torch.Tensor):
        def __reduce_ex__(self, protocol):
            raise RuntimeError("can't start new thread")

    dataset = build_dataset(tiny_config, "val")
    load = dataset.load
    monkeypatch.setattr(dataset, "load", lambda draw: (load(draw)[0], {"boxes": Heavy(1)}))
    loader = build_loader(
        dataset, EvalBatchSampler(dataset.annotations.sizes, 2), workers=1, device=torch.device("cpu")
    )
    with pytest.raises(UserError, match=r"process \d+ ran out of memory"):
        list(iterate(loader))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_dry_run_below_a_limit_of_its_address_space(tiny_config, capfd, workers):
    """In a process that may take 60 MB more than it begins with. A batch in float32 has 113 MB, which do not fit into
    memory that the process has freed before."""
    sizes = ["data.short_side=1536", "data.long_side=1536", f"data.workers={workers}"]
    config = tiny_config.with_overrides(sizes)

    def dry_run():
        limit_address_space(60_000_000)
        run_tool(lambda: print(training.dry_run(config)))

    process = multiprocessing.get_context("fork").Process(target=dry_run)
    process.start()
    process.join(120)
    err = capfd.readouterr().err
    assert process.exitcode == 2 and "Traceback" not in err
    assert err.count("error: ") == 1 and ("out of memory" in err or "If memory ran out" in err)


def limit_address_space(more):
    """Let this process take so many bytes more than it has."""
    with open("/proc/self/statm") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def test_room_below_a_limit_of_the_address_space():
    def measure(out):
        limit_address_space(50_000_000)
        out.value = available_memory()

    context = multiprocessing.get_context("fork")
    out = context.Value("q", -1)
    process = context.Process(target=measure, args=(out,))
    process.start()
    process.join()
    assert 0 < out.value <= 50_000_000


def test_room_below_limits_of_control_groups(tmp_path):
    """Both versions, and the parents' limits; files in the page cache are no hindrance."""

    def group(folder, values):
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in values.items():
            (folder / name).write_text(f"{value}\n")

    new = {"memory.max": 1000, "memory.current": 700, "memory.stat": "anon 1\ninactive_file 100"}
    group(tmp_path / "a" / "b", {**new, "memory.max": "max"})
    group(tmp_path / "a", new)
    old = {"memory.limit_in_bytes": 90, "memory.usage_in_bytes": 95, "memory.stat": "total_inactive_file 0"}
    group(tmp_path / "memory" / "c", old)
    (tmp_path / "membership").write_text("4:cpu,memory:/c\n2:pids:/\n0::/a/b\n")
    assert list(memory._cgroups(tmp_path, tmp_path / "membership")) == [0, 400]
    assert list(memory._cgroups(tmp_path, tmp_path / "absent")) == []
