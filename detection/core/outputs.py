"""Checks of every output file: it must not be an input of the same command nor a file that the toolkit did not write.

A hidden file in each folder lists the files that this toolkit wrote, with a digest of their content: a file that was
edited or replaced counts as the user's. If size and time of change are those in the list, the content is not read.
"""

import contextlib
import functools
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from detection.core.errors import UserError
from detection.core.files import (
    KINDS,
    make_folder,
    open_regular_file,
    read_file,
    reason_of,
    sample_digest,
    shown,
    write_atomically,
)

NOTES = ".ghostnet-outputs"
"""One JSON list per line: [name, digest, stamp], or [name] for a file that is being written in place."""
LARGEST_NOTES = 1 << 28
RUN_FILES = ("predictions.json", "report.html", "report.json")
"""Files that commands write into the folder of a run; they count as ours even without a note (older runs, copies)."""
RUN_MARKS = ("best.pt", "config.yaml", "metrics.jsonl")
"""A folder with all of these holds a run."""
_BEGUN = ""
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT
for _flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"):  # not on Windows
    _APPEND |= getattr(os, _flag, 0)


def check_outputs(outputs: Iterable[str | Path], inputs: Iterable[Any] = (), *, force: bool = False) -> None:
    """Create the folders of the outputs, and check before any work that no file is overwritten by mistake.

    Args:
        outputs: files that the command will write.
        inputs: files and folders that the same command reads; None and absent ones are ignored. In a folder, all files
            that this toolkit did not write are inputs.
        force: overwrite files that this toolkit did not write, but no inputs.

    Raises:
        UserError: an output is named twice, is an input, a folder or a device, exists and is not this toolkit's, or
            cannot be written; the message names it.
    """
    paths = [os.fspath(output) for output in outputs]
    taken, folders = _inputs(inputs)
    foreign = []
    for path in paths:
        try:
            status = os.stat(path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise UserError(f"output {shown(path)} cannot be written to: {reason_of(error, path)}") from None
        if (status.st_dev, status.st_ino) in taken:
            raise _is_an_input(path)
        if not stat.S_ISREG(status.st_mode):
            kind = KINDS.get(stat.S_IFMT(status.st_mode), "no file")
            raise UserError(f"output {shown(path)} is {kind}; choose the name of a file")
        if not is_own(path):
            if folders and not folders.isdisjoint(map(str, Path(path).resolve().parents)):
                raise _is_an_input(path)
            foreign.append(path)
    if foreign and not force:
        names = ", ".join(map(shown, foreign[:3])) + (", …" if len(foreign) > 3 else "")
        count = "" if len(foreign) == 1 else f"{len(foreign)} files would be overwritten: "
        raise UserError(
            f"{count}{names}: this toolkit did not write {'it' if len(foreign) == 1 else 'them'} (or something changed "
            f"{'it' if len(foreign) == 1 else 'them'} since); choose another name, or overwrite with --force"
        )
    places = list(map(os.path.abspath, paths))
    if len(set(places)) < len(places):
        twice = next(path for i, path in enumerate(paths) if places[i] in places[:i])
        raise UserError(f"output {shown(twice)} is named twice; choose another name")
    for folder in dict.fromkeys(map(os.path.dirname, paths)):
        make_folder(Path(folder or "."), "output folder")


def write_output(path: Path, write: Any) -> None:
    """`write_atomically` with a note that this toolkit wrote the file. The note comes before the file is in place, so
    that a killed process leaves no file without a note. Raises UserError as `write_atomically` does."""
    write_atomically(path, write, placing=lambda written: _note(path, written))


def begin_output(path: Path) -> None:
    """Note a file that is written in place, after it was opened: a part that a killed process leaves is ours, too."""
    _append(path, [path.name])


def note_output(path: Path) -> None:
    """Note that this toolkit has just written a file."""
    _note(path, path)


def is_own(path: str | Path) -> bool:
    """Whether this toolkit wrote the current content of the file."""
    folder, name = os.path.split(os.path.abspath(path))
    try:
        known = _known(folder).get(name)
        if known is None:
            return name in RUN_FILES and all(os.path.isfile(os.path.join(folder, mark)) for mark in RUN_MARKS)
        if _BEGUN in known:
            return True
        if _stamp(os.stat(path)) in known:
            return True
        with open_regular_file(path) as file:
            return sample_digest(file) in known
    except (OSError, UserError):
        return False


def _note(path: Path, written: str | Path) -> None:
    with contextlib.suppress(UserError), open_regular_file(written) as file:
        _append(path, [path.name, sample_digest(file), _stamp(os.fstat(file.fileno()))])


def _append(path: Path, note: list[str]) -> None:
    # If this fails (a full disk), the next call asks for --force. Links are not followed, and a named pipe does not
    # block.
    with contextlib.suppress(OSError):
        notes = os.open(os.path.join(path.parent, NOTES), _APPEND, 0o666)
        try:
            if stat.S_ISREG(os.fstat(notes).st_mode):
                # A new line even if a killed process left half a line.
                os.write(notes, f"\n{json.dumps(note)}\n".encode())
        finally:
            os.close(notes)


def _stamp(status: os.stat_result) -> str:
    """Size and time of change, which recognize an unchanged file without reading it."""
    return f"{status.st_size}-{status.st_mtime_ns}"


def _known(folder: str) -> dict[str, set[str]]:
    notes = os.path.join(folder, NOTES)
    try:
        status = os.stat(notes)
    except FileNotFoundError:
        return {}
    return _read_notes(notes, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=16)
def _read_notes(path: str, changed: int, size: int) -> dict[str, set[str]]:
    """Name -> digests and stamps of all files written under it; a killed process may have left the last one unplaced.

    `changed` and `size` are only keys of the cache: they distinguish states of the file.
    """
    found: dict[str, set[str]] = {}
    for line in read_file(path, "notes", largest=LARGEST_NOTES).decode(errors="replace").splitlines():
        # A killed process may leave half a line; lines of other programs may be nested too deep.
        with contextlib.suppress(ValueError, RecursionError):
            note = json.loads(line)
            if isinstance(note, list) and note and all(isinstance(part, str) for part in note):
                known = found.setdefault(note[0], set())
                known.discard(_BEGUN)
                known.update(note[1:] or [_BEGUN])
    return found


def _inputs(inputs: Iterable[Any]) -> tuple[set[tuple[int, int]], set[str]]:
    """(device, inode) of the inputs that are files, and paths of those that are folders."""
    files, folders = set(), set()
    for path in inputs:
        with contextlib.suppress(OSError, ValueError, TypeError):
            status = os.stat(path)
            if stat.S_ISDIR(status.st_mode):
                folders.add(str(Path(path).resolve()))
            else:
                files.add((status.st_dev, status.st_ino))
    return files, folders


def _is_an_input(path: str) -> UserError:
    return UserError(f"output {shown(path)} is an input of the same command; choose another name")
