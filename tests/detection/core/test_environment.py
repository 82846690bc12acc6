"""The description of the environment, as in environment.json and in reports."""

import subprocess

import pytest
from conftest import ROOT

from detection.core.environment import commit, describe_environment


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_the_commit_is_that_of_the_checkout():
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    expected = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    found = commit()
    assert found is not None and len(found.removesuffix("-dirty")) >= 12
    assert expected.startswith(found.removesuffix("-dirty"))
    assert describe_environment("cpu")["commit"].removesuffix("-dirty") == found.removesuffix("-dirty")
