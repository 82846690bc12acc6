"""The fuzzer of fuzz.py: a few examples of each target each time, twenty minutes of it in `make test-all`."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import made_once
from fuzz import TARGETS, make_base, try_example, warm_up
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    def make(root: Path) -> None:
        make_base(root / "base")

    return made_once(tmp_path_factory, "fuzz", make) / "base"


@pytest.mark.parametrize("target", TARGETS)
def test_a_few_examples(target, base, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    warm_up(base, tmp_path / "warm")

    @settings(
        max_examples=6,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=True))
    def search(rnd):
        wrong = try_example(target, rnd, base, tmp_path / "example")
        assert wrong is None, f"{(tmp_path / 'example' / 'commands.txt').read_text()}\n{wrong}"

    search()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_minutes(tmp_path):
    command = [sys.executable, Path(__file__).with_name("fuzz.py"), "--minutes", "20", "--keep", tmp_path / "found"]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
