"""A training that is killed (SIGKILL) at any moment and resumed ends as one that was not, bit for bit."""

import json
import random
import signal

import pytest
import torch
import yaml
from conftest import tiny_raw, write_coco
from processes import ToolProcess

from detection.checkpoint import read_checkpoint
from detection.core.outputs import NOTES

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tool):
    root = tmp_path_factory.mktemp("kill")
    write_coco(root / "data", images=16)
    raw = tiny_raw(root / "data", root / "whole")
    raw["train"]["epochs"] = 4
    raw["data"]["workers"] = 1
    raw["data"]["augment"] = {"scale": [0.8, 1.2], "mosaic": 0.3, "brightness": 0.2}
    (root / "config.yaml").write_text(yaml.safe_dump(raw))
    done = tool("train", root / "config.yaml")
    assert done.returncode == 0, done.stderr
    last = (root / "whole" / "metrics.jsonl").read_text().splitlines()[-1]
    return root, json.loads(last)["seconds"]


def states(folder):
    content = read_checkpoint(folder / "last.pt")
    optimizer = {
        f"{i}.{k}": v
        for i, s in content["optimizer"]["state"].items()
        for k, v in s.items()
        if isinstance(v, torch.Tensor)
    }
    return [content["model"], content["ema"], optimizer]


def records(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"], line["memory_mb"]
    return lines


def kill_and_resume(root, seconds, seed):
    """Start, kill at a random moment of the training, resume, … ; returns the folder and how often it was killed."""
    rng = random.Random(seed)
    folder = root / f"killed{seed}"
    output = root / f"output{seed}.txt"
    kills = 0
    while True:
        resume = ["--resume"] if (folder / "last.pt").exists() else []
        arguments = [root / "config.yaml", f"output_dir={folder}", *resume]
        output.write_text("")
        process = ToolProcess("train", arguments, output, root / f"errors{seed}.txt")
        if kills == 3:
            assert process.wait(200)
        else:
            # The network is told when all is built and the first step comes.
            process.wait_until(lambda: "retinanet on" in output.read_text())
            if not process.wait(seconds * rng.uniform(0.05, 0.7 if kills == 0 else 1.0)):
                process.send(signal.SIGKILL)
                assert process.wait(20)
                kills += 1
                continue
        assert process.completed().returncode == 0, process.completed()
        return folder, kills


def check(root, seconds, seed):
    folder, kills = kill_and_resume(root, seconds, seed)
    assert kills >= 1
    for expected, found in zip(states(root / "whole"), states(folder), strict=True):
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert records(folder) == records(root / "whole")
    # A kill inside a save leaves its temporary file; the run that goes on clears it away.
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == [NOTES]


@pytest.mark.parametrize("seed", range(1))
def test_killed_and_resumed(uninterrupted, seed):
    check(*uninterrupted, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 12))
def test_killed_and_resumed_more(uninterrupted, seed):
    check(*uninterrupted, seed)
