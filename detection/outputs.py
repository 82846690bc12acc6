"""The guard in front of every output file: it is no input of the same command, and no file of somebody else's.

Which files this toolkit wrote is noted in a hidden file of their folder, with a digest of their content: a file that
was edited, or that something else put in its place, is the user's again.
"""

import argparse
import contextlib
import functools
import json
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from detection.errors import UserError
from detection.files import (
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
"""One JSON list [name, digest] a line; the last line of a name counts."""
LARGEST_NOTES = 1 << 28


def add_force(parser: argparse.ArgumentParser) -> None:
    """The option `--force` of a command that writes files."""
    parser.add_argument("--force", action="store_true", help="overwrite files that this toolkit did not write")


def check_outputs(outputs: Iterable[str | Path], inputs: Iterable[Any] = (), *, force: bool = False) -> None:
    """Make the folders of the outputs, and see that no file is overwritten that must not be; before any work.

    Args:
        outputs: files that are to be written.
        inputs: files and folders that the same command reads; None and what does not exist are passed over.
        force: overwrite files that this toolkit did not write; never inputs.

    Raises:
        UserError: an output is an input, a folder or a device, exists and is not this toolkit's, or cannot be
            written; the message names it.
    """
    paths = [Path(output) for output in outputs]
    taken = {identity for path in inputs if path is not None and (identity := _identity(path)) is not None}
    foreign = []
    for path in paths:
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise UserError(f"output {shown(path)} cannot be written: {reason_of(error, path)}") from None
        if (status.st_dev, status.st_ino) in taken:
            raise UserError(f"output {shown(path)} is an input of the same command; choose another name")
        if not stat.S_ISREG(status.st_mode):
            kind = KINDS.get(stat.S_IFMT(status.st_mode), "no file")
            raise UserError(f"output {shown(path)} is {kind}; choose the name of a file")
        if not force and not is_own(path):
            foreign.append(path)
    if foreign:
        names = ", ".join(shown(path) for path in foreign[:3]) + (", …" if len(foreign) > 3 else "")
        count = "" if len(foreign) == 1 else f"{len(foreign)} files would be overwritten: "
        raise UserError(
            f"{count}{names}: this toolkit did not write {'it' if len(foreign) == 1 else 'them'} (or something changed "
            f"{'it' if len(foreign) == 1 else 'them'} since); choose another name, or overwrite with --force"
        )
    for folder in dict.fromkeys(path.parent for path in paths):
        make_folder(folder, "output folder")


def write_output(path: Path, write: Callable[[Any], Any]) -> None:
    """`write_atomically`, noted as this toolkit's. Raises UserError as that does."""
    write_atomically(path, write)
    note_outputs([path])


def note_outputs(paths: Sequence[Path]) -> None:
    """Note files that were just written as this toolkit's. Where that fails, the next call asks for --force."""
    lines: dict[Path, list[str]] = {}
    for path in paths:
        with contextlib.suppress(UserError), open_regular_file(path) as file:
            lines.setdefault(path.parent, []).append(json.dumps([path.name, sample_digest(file)]))
    for folder, added in lines.items():
        with contextlib.suppress(OSError), (folder / NOTES).open("a", encoding="utf-8") as notes:
            # A line of its own, also after half a line that a killed process left.
            notes.write("\n".join(["", *added, ""]))


def is_own(path: Path) -> bool:
    """Whether this toolkit wrote the file as it is now."""
    notes = path.parent / NOTES
    try:
        status = notes.stat()
        known = _read_notes(str(notes), status.st_mtime_ns, status.st_size).get(path.name)
        if known is None:
            return False
        with open_regular_file(path) as file:
            return sample_digest(file) == known
    except (OSError, UserError):
        return False


@functools.lru_cache(maxsize=16)
def _read_notes(path: str, changed: int, size: int) -> dict[str, str]:
    """Name -> digest. The arguments besides the path only tell one state of the file from another."""
    found: dict[str, str] = {}
    for line in read_file(path, "notes", largest=LARGEST_NOTES).decode(errors="replace").splitlines():
        # A process that was killed may leave half a line.
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry):
                found[entry[0]] = entry[1]
    return found


def _identity(path: str | Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino
