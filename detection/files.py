"""Files that are whole or not there."""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

from detection.errors import UserError

CACHE_FOLDER = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ghostnet-detection"
"""For what can be made anew."""
UNFINISHED = ".unfinished"
"""How the name of a file ends that is being written; a killed process may leave such files."""


def write_atomically(path: Path, write: Any) -> None:
    """Call `write(file)` on a temporary file beside `path`, flush it to disk, and only then put it in place.

    A kill or a full disk at any moment leaves the earlier file whole.

    Raises:
        UserError: the disk is full or the folder cannot be written to.
    """
    name = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED, delete=False
        ) as file:
            name = file.name
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except (OSError, RuntimeError) as error:
        # torch.save's zip writer turns what the file raised into a RuntimeError of its own.
        cause: BaseException = error
        while cause.__context__ is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
        kept = f"; the earlier {path.name} is untouched" if path.exists() else ""
        raise UserError(f"{path} could not be written: {reason} (is the disk full?){kept}") from error
    finally:
        if name is not None:
            with contextlib.suppress(OSError):
                os.unlink(name)


def make_folder(folder: Path, name: str) -> None:
    """Make `folder`, if it is not there, and see that files can be written into it.

    Raises:
        UserError: they cannot; the message calls it `name`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}{UNFINISHED}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{name} {folder} cannot be written to: {error.strerror}") from None


def remove_unfinished(folder: Path) -> None:
    """Remove what a process killed while writing left in `folder`; nothing may be writing there now."""
    for path in folder.glob(f".*{UNFINISHED}"):
        path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
