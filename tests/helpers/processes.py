"""Tools as processes of their own that start at once: forked from a process that has imported torch and its company.

A tool's imports take seconds, many times what most tests of it do.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SLOW_IMPORTS = [
    "torch",
    "torchvision",
    "torch.utils.tensorboard",
    "albumentations",
    "scipy.optimize",
    "pycocotools.mask",
    "matplotlib.figure",
    "jinja2",
]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(SLOW_IMPORTS)


class ToolProcess:
    """`python tools/NAME.py ARGUMENTS`, running; what it prints goes to the files `out` and `err`."""

    def __init__(self, name: str, arguments: Sequence[object], out: Path, err: Path, **options) -> None:
        """`options`: cwd, what `environment` has besides, and start_method of the processes that the tool starts
        (None: this platform's)."""
        path = str(ROOT / "tools" / f"{name}.py")
        self.out, self.err = out, err
        arguments = [str(argument) for argument in arguments]
        self._process = _context.Process(target=_run, args=(path, arguments, out, err), kwargs=options)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def running(self) -> bool:
        return self._process.is_alive()

    def send(self, number: int) -> None:
        """A signal to the process and its children, as a terminal sends it; SIGKILL to the process alone."""
        if number == signal.SIGKILL:
            os.kill(self.pid, number)
        else:
            os.killpg(self.pid, number)

    def wait(self, seconds: float) -> bool:
        """False where it runs on after so long."""
        self._process.join(max(seconds, 0))
        return not self.running()

    def wait_until(self, condition, seconds: float = 120) -> None:
        """Until `condition()` holds or the process has ended."""
        deadline = time.monotonic() + seconds
        while not condition() and self.running():
            assert time.monotonic() < deadline, self.completed()
            time.sleep(0.02)

    def completed(self) -> subprocess.CompletedProcess:
        code = self._process.exitcode
        return subprocess.CompletedProcess(self._process.name, code, self.out.read_text(), self.err.read_text())


def run_tool(name: str, arguments: Sequence[object], folder: Path, **options) -> subprocess.CompletedProcess:
    """Run tools/NAME.py to its end; `folder` is for what it prints; options as ToolProcess's."""
    process = ToolProcess(name, arguments, folder / "out.txt", folder / "err.txt", **options)
    if not process.wait(240):
        process.send(signal.SIGKILL)
        raise AssertionError(f"tools/{name}.py was not done after 240 s: {process.completed()}")
    return process.completed()


def _run(
    path: str, arguments: list[str], out: Path, err: Path, cwd: Path = ROOT, environment=None, start_method=None
) -> None:
    os.setsid()
    os.environ.update(environment or {})
    # Tests may run where they are ignored: in the background of a script, under nohup.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    multiprocessing.set_start_method(start_method, force=True)
    os.chdir(cwd)
    for file, descriptor in ((out, 1), (err, 2)):
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(handle, descriptor)
        os.close(handle)
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")
