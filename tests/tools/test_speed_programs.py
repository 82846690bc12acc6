"""Programs of tools/dev/ that measure what the documentation claims: their help, and mistaken arguments."""

import pytest
from conftest import assert_clear_error

PROGRAMS = ("annotation_speed", "cost_tables", "evaluation_speed", "folder_speed", "training_speed")


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_has_an_example(name, tool):
    done = tool(f"dev/{name}", "--help")
    assert done.returncode == 0 and "example" in done.stdout, done.stderr
    assert f"  python tools/dev/{name}.py" in done.stdout and f"usage: python tools/dev/{name}.py" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("annotation_speed", "no/such"),
        ("cost_tables", "no/such"),
        ("folder_speed", "no/such", "."),
        ("folder_speed", "README.md", "no/such"),
        ("training_speed", "no/such.yaml"),
    ],
)
def test_a_mistyped_path_is_one_clear_error(arguments, tool):
    name, *others = arguments
    assert_clear_error(tool(f"dev/{name}", *others), "no/such", "does not exist")
