"""Run a tool in this process, as fast as a function call: what it prints and its exit status."""

import contextlib
import io
import runpy
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from processes import ROOT


@dataclass
class Outcome:
    """How a tool ended."""

    code: int
    out: str
    err: str

    def assert_error(self, *words: str, code: int = 2) -> None:
        """Exit status `code`, one line that begins with "error: ", with these words, and no traceback."""
        assert self.code == code, f"exit status {self.code}\n{self.out}\n{self.err}"
        # argparse prints the usage and then "train.py: error: …".
        errors = [line for line in self.err.splitlines() if line.startswith("error: ") or ".py: error: " in line]
        assert len(errors) == 1, self.err
        for word in words:
            assert word in self.err, f"{word!r} is not in: {self.err}"


def run(tool: str, *arguments: object) -> Outcome:
    """tools/TOOL.py with these arguments; signal handlers, sys.argv and sys.path are as before afterwards."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    argv, path = sys.argv, list(sys.path)
    sys.argv = [str(ROOT / "tools" / f"{tool}.py"), *map(str, arguments)]
    code: object = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv, sys.path[:] = argv, path
        for number, handler in handlers.items():
            signal.signal(number, handler)
    outcome = Outcome(code if isinstance(code, int) else 0 if code is None else 1, out.getvalue(), err.getvalue())
    assert "Traceback" not in outcome.err, outcome.err
    assert Path(ROOT, "tools", f"{tool}.py").is_file()
    return outcome
