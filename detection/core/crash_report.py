"""Keeps the trace of an unforeseen exception in a file."""

import contextlib
import datetime
import os
import sys
import tempfile
import traceback
from pathlib import Path

from detection.core.files import CACHE_FOLDER


def keep_trace(error: Exception) -> str:
    """Write the trace of an unforeseen exception; returns the path of the file, or words if none could be written."""
    text = f"command: {sys.argv}\nPython {sys.version}\n\n{''.join(traceback.format_exception(error))}"
    name = f"trace-{datetime.datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.txt"
    for folder in (CACHE_FOLDER / "traces", Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
            return str(folder / name)
    return "no file, as none could be written"
