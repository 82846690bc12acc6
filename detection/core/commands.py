"""Names of commands for messages: `python tools/NAME.py` or, where the toolkit is installed, `ghostdet NAME`."""

import sys
from pathlib import Path


def command(name: str) -> str:
    """How to call the command NAME, in the way this process was called."""
    return f"python tools/{name}.py" if runs_script() else f"ghostdet {name}"


def runs_script() -> bool:
    """Whether this process is `python tools/NAME.py` or `python tools/dev/NAME.py`."""
    program = Path(sys.argv[0]).absolute()
    return program.suffix == ".py" and program.parent.name in ("tools", "dev")
