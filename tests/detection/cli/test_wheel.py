"""A wheel in a fresh environment: `ghostdet` runs from any folder and finds its configs by name."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, made_once

pytest.importorskip("setuptools", minversion="70.1")  # builds wheels without the package wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: a build leaves folders behind."""

    def make(folder: Path) -> None:
        source = folder / "source"
        for name in ("backbones", "detection", "configs", "tools"):
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        run_pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder / "wheels", source)

    (path,) = (made_once(tmp_path_factory, "wheel", make) / "wheels").iterdir()
    return path


@pytest.fixture(scope="module")
def ghostdet(wheel, tmp_path_factory):
    """Run the installed `ghostdet` in a folder: ghostdet(folder, "train", …) -> CompletedProcess with text."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False)
    scripts = place / ("Scripts" if os.name == "nt" else "bin")
    run_pip("--python", scripts / "python", "install", "--no-deps", "--no-index", wheel)
    # The requirements are those of the environment that runs the tests.
    (installed,) = {path.parents[1] for path in place.rglob("detection/__main__.py")}
    (installed / "requirements.pth").write_text(sysconfig.get_path("purelib"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess:
        command = [scripts / "ghostdet", *map(str, arguments)]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)

    return run


def run_pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    # With PYTHONPATH pip finds the checkout's own metadata, and installs nothing.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr


def test_what_a_wheel_holds(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"detection/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    templates = {path.relative_to(ROOT).as_posix() for path in (ROOT / "detection/core/templates").glob("*.html")}
    templates |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "detection/runtime/adapters").glob("*.yaml")}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "detection").rglob("*.py")}
    assert len(configs) > 15 and len(templates) > 4 and configs | templates | modules <= names
    folders = {name.split("/")[0] for name in names}
    assert {name for name in folders if not name.endswith(".dist-info")} == {"backbones", "detection"}


def test_the_installed_command(ghostdet, tmp_path):
    done = ghostdet(tmp_path, "--help")
    assert done.returncode == 0 and "train a detector" in done.stdout, done.stderr
    assert ghostdet(tmp_path, "--version").stdout.startswith("ghostdet 0.")
    done = ghostdet(tmp_path, "train", "demo")
    assert done.returncode == 2 and "data/demo/train.json does not exist" in done.stderr
    done = ghostdet(tmp_path, "pretrain", "ghostnet_imagenet.yaml")
    assert done.returncode == 2 and "data.train: folder data/imagenet/train does not exist" in done.stderr
    (tmp_path / "best.pt").touch()
    done = ghostdet(tmp_path, "export", "best.pt", "--format", "onnx", "--size", 99999)
    assert done.returncode == 2 and "pixels at most; ghostdet detect --tile is for more" in done.stderr


@pytest.mark.slow
def test_a_dry_run_from_another_folder(ghostdet, tmp_path):
    done = ghostdet(tmp_path, "make_demo_data", "--train", 4, "--val", 2)
    assert done.returncode == 0, done.stderr
    done = ghostdet(tmp_path, "train", "demo", "--dry-run", "data.workers=0", "device=cpu")
    assert done.returncode == 0 and "dry run: nothing was written" in done.stdout, done.stderr
