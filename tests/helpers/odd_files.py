"""Files that no command can read: pipes, sockets, and links that lead nowhere."""

import os
import socket
from pathlib import Path


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "fifo.jpg")
    return folder / "fifo.jpg"


def unix_socket(folder: Path) -> Path:
    path = folder / "socket.jpg"
    with socket.socket(socket.AF_UNIX) as made:
        # Names of sockets may have 108 characters only.
        before = os.getcwd()
        os.chdir(folder)
        try:
            made.bind(path.name)
        finally:
            os.chdir(before)
    return path


def loop(folder: Path) -> Path:
    (folder / "loop.jpg").symlink_to("loop.jpg")
    return folder / "loop.jpg"


def dangling(folder: Path) -> Path:
    (folder / "dangling.jpg").symlink_to("nowhere.jpg")
    return folder / "dangling.jpg"
