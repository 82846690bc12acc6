"""A command that is stopped while its processes start: quickly, without a traceback, and nothing goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from processes import ROOT

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from detection.cli.run_tool import run_tool
from detection.doctor import image_checks as images

def main():
    print("ready", flush=True)
    found = images.probe_images(sorted(Path({folder!r}).iterdir()) * 200, workers=2)
    print("done", len(found.rows("ok")), flush=True)

if __name__ == "__main__":
    images.MAX_SERIAL_IMAGES = 0
    run_tool(main)
"""
slow = pytest.mark.slow


def alive(session: int) -> list[str]:
    """The processes of a session that still run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            _, _, rest = (folder / "stat").read_text().rpartition(")")
        except OSError:  # it has just ended
            continue
        state, _, _, of = rest.split()[:4]
        if int(of) == session and state != "Z":
            found.append(folder.name)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize(
    ("name", "delay"),
    [
        ("SIGINT", 0.3),
        *(pytest.param(name, delay, marks=slow) for name in ("SIGINT", "SIGTERM") for delay in (0, 0.1, 0.7, 1.2, 2)),
    ],
)
def test_doctor_stopped_while_its_workers_start(name, delay, tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(50):
        cv2.imwrite(str(tmp_path / "images" / f"{number}.jpg"), np.zeros((900, 900, 3), np.uint8))
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT), folder=str(tmp_path / "images")))
    started = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with started as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(delay)
        os.killpg(process.pid, getattr(signal, name))  # what a terminal does
        out, err = process.communicate(timeout=30)
    lines = [line for line in err.splitlines() if not line.startswith("images: ")]  # progress
    assert (process.returncode, out, lines) == (130, "", ["stopped"])
    deadline = time.monotonic() + 5
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(process.pid)
