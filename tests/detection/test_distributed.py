"""A detector trained by two processes under torchrun; the classifier's test is in test_pretraining.py."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import ROOT, tiny_raw, write_coco

from detection import UserError, distributed
from detection.checkpoint import read_checkpoint


def torchrun(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )


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
    assert records[-1]["step"] == 9  # 14 pictures, 4 a step, two sit out
    assert len(read_checkpoint(tmp_path / "run" / "last.pt")["rng"]) == 2

    # The shares of both make up the evaluation of one process.
    done = tool("evaluate", tmp_path / "run" / "best.pt", "--json", tmp_path / "numbers.json", "data.workers=0")
    assert done.returncode == 0, done.stderr
    best = max(record["AP"] for record in records)
    assert json.loads((tmp_path / "numbers.json").read_text())["AP"] == pytest.approx(best, abs=1e-3)
