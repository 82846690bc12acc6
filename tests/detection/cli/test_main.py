"""The command `ghostdet`: what it calls, what its help shows, and how it finds configs by name."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, tiny_raw

from detection.cli import main as ghostdet
from detection.cli.find_config import CONFIGS, existing_or_shipped, find_config, shipped_names
from detection.core.errors import UserError

TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))


def test_each_tool_is_a_command():
    assert sorted(ghostdet.COMMANDS) == TOOLS
    for name in TOOLS:
        code = (ROOT / "tools" / f"{name}.py").read_text()
        assert f"from detection.cli.{name} import main\n" in code and len(code.splitlines()) < 12


@pytest.fixture()
def help_of(monkeypatch, capsys):
    def run(main, program: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", TOOLS)
def test_help_shows_the_command_that_was_called(name, help_of):
    text = help_of(ghostdet.run, "/usr/bin/ghostdet", name, "--help")
    assert text.startswith(f"usage: ghostdet {name} ") and f"  ghostdet {name} " in text.replace("example: ", "  ")
    assert "tools/" not in text and "configs/" not in text
    script = ROOT / "tools" / f"{name}.py"
    text = help_of(lambda: runpy.run_path(str(script), run_name="__main__"), str(script), "--help")
    assert text.startswith(f"usage: python tools/{name}.py ") and "ghostdet " not in text
    assert "(default: None)" not in text and "(default: False)" not in text


def test_help_lists_the_commands(capsys):
    assert ghostdet.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, text in ghostdet.COMMANDS.items():
        assert any(line.split() == [name, *text.split()] for line in lines)
    assert ghostdet.main([]) == 2 and capsys.readouterr().err.startswith("usage: ghostdet COMMAND")
    assert ghostdet.main(["--version"]) == 0 and capsys.readouterr().out.startswith("ghostdet ")


def test_an_unknown_command():
    with pytest.raises(UserError, match=r"unknown command trian \(did you mean train\?\)"):
        ghostdet.main(["trian"])
    with pytest.raises(UserError, match=r"unknown command xyz \(known: train, evaluate"):
        ghostdet.main(["xyz"])


def test_python_m_detection(tmp_path):
    """Exit status and message are those of a tool; a hyphen is as good as an underscore."""
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "try:\n    runpy.run_module('detection', run_name='__main__', alter_sys=True)\n"
        "finally:\n    print('torch' if 'torch' in sys.modules else 'no torch', file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "check-data", "no/such"]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr.splitlines()) == (2, ["error: file no/such does not exist", "no torch"])


# ---- configs by name


def test_configs_that_come_with_the_toolkit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert CONFIGS == ROOT / "configs" and "retina_ghost_320" in shipped_names()
    for name in ("demo", "demo.yaml"):
        assert find_config(name) == existing_or_shipped(name) == str(ROOT / "configs" / "demo.yaml")
    assert find_config("ghostnet_imagenet", "pretrain") == str(CONFIGS / "pretrain" / "ghostnet_imagenet.yaml")
    assert find_config("configs/demo") == "configs/demo" and existing_or_shipped("resnet18") == "resnet18"


def test_a_file_in_the_working_directory_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()  # a folder is no config
    assert find_config("demo") == str(CONFIGS / "demo.yaml")
    Path("demo.yaml").touch()
    assert find_config("demo") == find_config("demo.yaml") == "demo.yaml"
    Path("retina_ghost").touch()
    assert find_config("retina_ghost") == existing_or_shipped("retina_ghost") == "retina_ghost"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("retina_gost_320", r"did you mean retina_ghost_320\?"),
        ("retina_gost_320.yaml", r"did you mean retina_ghost_320\?"),
        ("my_recepi.yaml", r"did you mean my_recipe\.yaml\?"),
        ("zzz", "these come with the toolkit: demo, faster_rcnn_ghost"),
    ],
)
def test_a_name_that_is_no_config(name, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_recipe.yaml").touch()
    with pytest.raises(UserError, match=rf"config {name} does not exist \({hint}"):
        find_config(name)


def test_commands_take_names(tool, coco_set, tmp_path):
    """The tools, too: from a folder without configs/."""
    raw = yaml.safe_dump(tiny_raw(coco_set, tmp_path / "run"))
    (tmp_path / "tiny.yaml").write_text(raw)
    done = tool("train", "tiny", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0 and "dry run: nothing was written" in done.stdout, done.stderr
    done = tool("benchmark", "--cost", "retina_ghost_320", "--size", 64, cwd=tmp_path)
    assert done.returncode == 0 and "retina_ghost_320.yaml" in done.stdout, done.stderr
    done = tool("check_data", "demo", cwd=tmp_path)
    assert done.returncode == 2 and "data/demo/train.json" in done.stderr
    done = tool("train", "retina_gost", cwd=tmp_path)
    assert done.returncode == 2 and "did you mean retina_ghost?" in done.stderr
