"""Messages name commands in the way that the process was called."""

import sys

import pytest
from conftest import ROOT, assert_clear_error

from detection.core.commands import command


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (str(ROOT / "tools" / "train.py"), "python tools/detect.py"),
        ("tools/dev/ghostdet_ablation.py", "python tools/detect.py"),
        ("/usr/bin/ghostdet", "ghostdet detect"),
        ("/home/user/tools/ghostdet", "ghostdet detect"),
        ("/tools/lib/detection/__main__.py", "ghostdet detect"),
        ("", "ghostdet detect"),
    ],
)
def test_command(program, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program])
    assert command("detect") == expected


def test_script_in_its_own_folder(monkeypatch):
    monkeypatch.chdir(ROOT / "tools")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert command("train") == "python tools/train.py"


def test_a_script_names_scripts(tool, tmp_path):
    (tmp_path / "best.pt").touch()
    done = tool("export", tmp_path / "best.pt", "--format", "onnx", "--size", 99999)
    assert_clear_error(done, "pixels at most; python tools/detect.py --tile is for more")
