"""Reading of regular files and atomic writing."""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from detection.core.errors import UserError

CACHE_FOLDER = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ghostnet-detection"
"""For files that can be created again."""
UNFINISHED = ".unfinished"
"""Suffix of files that are being written; a killed process may leave such files."""
SAMPLES, SAMPLE_BYTES = 16, 1 << 16


KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular_file(path: str | Path, what: str = "file") -> BinaryIO:
    """Open a regular file for reading in binary mode. Other kinds of files (named pipes, devices) are refused at once;
    `open` would wait for them.

    Raises:
        UserError: the file is absent, not readable, or not regular; the message calls it `what`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError as error:
        if os.path.islink(path):
            raise UserError(f"{what} {shown(path)} cannot be read: {reason_of(error, path)}") from None
        raise UserError(f"{what} {shown(path)} does not exist") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{what} {shown(path)} cannot be read: {reason_of(error, path)}") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise UserError(f"{what} {shown(path)} cannot be read: {_kind(mode)}")
    return open(descriptor, "rb")


def file_fault(path: str | Path) -> str | None:
    """Why `open_regular_file` would refuse a file, in words; None for a regular file. The file is not opened."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        return reason_of(error, path)
    return None if stat.S_ISREG(mode) else _kind(mode)


def read_file(path: str | Path, what: str = "file", *, largest: int) -> bytes:
    """The content of a regular file of at most `largest` bytes. Raises UserError, see `open_regular_file`."""
    with open_regular_file(path, what) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            data = b"" if size > largest else file.read(size) if size else _read_unsized(file, largest)
        except OSError as error:
            raise UserError(f"{what} {shown(path)} cannot be read: {reason_of(error, path)}") from None
    if size > largest or len(data) > largest:
        raise UserError(f"{what} {shown(path)} is too large: {max(size, len(data)):,} bytes, the limit is {largest:,}")
    return data


def _read_unsized(file: BinaryIO, largest: int) -> bytes:
    """Files of /proc have no size and may have no end."""
    data = bytearray()
    while len(data) <= largest and (block := file.read(1 << 16)):
        data += block
    return bytes(data)


def reason_of(error: OSError | ValueError, path: str | Path = "") -> str:
    """Why a file could not be opened, in words."""
    if isinstance(error, OSError):
        if error.errno == errno.ENXIO:  # the error of a socket
            return "it is a socket or a device, not a regular file"
        if error.errno == errno.ELOOP:
            return "it is a link that leads back to itself"
        if error.errno == errno.ENOENT and os.path.islink(path):
            return f"it is a link to {os.readlink(path)}, which does not exist"
        return error.strerror or str(error)
    return "its name holds a NUL character" if "null" in str(error) else str(error)


def _kind(mode: int) -> str:
    return f"it is {KINDS.get(stat.S_IFMT(mode), 'something else')}, not a regular file"


def shown(path: str | Path) -> str:
    """A path for a message: unprintable characters escaped, very long ones cut in the middle."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(path))
    return text if len(text) <= 300 else f"{text[:140]}…{text[-140:]}"


def file_digest(path: str | Path, what: str = "file") -> bytes:
    """SHA-1 of the whole content. Raises UserError, see `open_regular_file`."""
    digest = hashlib.sha1()
    with open_regular_file(path, what) as file:
        try:
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.digest()
        except OSError as error:
            raise UserError(f"{what} {shown(path)} cannot be read: {reason_of(error, path)}") from None


def sample_digest(file: BinaryIO) -> str:
    """A digest of 16 evenly spread samples of a file, at most a megabyte; of the whole file if it is smaller."""
    size = os.fstat(file.fileno()).st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    if size <= SAMPLES * SAMPLE_BYTES:
        file.seek(0)
        digest.update(file.read(SAMPLES * SAMPLE_BYTES))
        return digest.hexdigest()
    for i in range(SAMPLES):
        file.seek(max(0, size - SAMPLE_BYTES) * i // (SAMPLES - 1))
        digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def write_atomically(path: Path, write: Any, *, placing: Callable[[str], None] | None = None) -> None:
    """Call `write(file)` on a temporary file beside `path`, flush it to disk, and only then put it in place.

    If the process is killed or the disk is full, the earlier file stays complete.

    Args:
        placing: called with the name of the finished temporary file, just before it is put in place.

    Raises:
        UserError: the disk is full, or the folder is not writable.
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
        if placing is not None:
            placing(name)
        os.replace(name, path)
    except (OSError, RuntimeError) as error:
        # torch.save's zip writer turns an error of the file into a RuntimeError of its own.
        cause: BaseException = error
        while cause.__context__ is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if not isinstance(cause, OSError):
            # The file is not the cause: a signal handler raised the error, or memory ran out.
            raise cause from None
        kept = f"; the earlier {path.name} is untouched" if path.exists() else ""
        raise UserError(f"{path} could not be written: {_reason_and_hint(cause)}{kept}") from error
    finally:
        if name is not None:
            with contextlib.suppress(OSError):
                os.unlink(name)


def link_or_copy(path: Path, name: Path) -> None:
    """Make `name` a hard link to `path`, or a copy where the file system has no hard links.

    Later atomic writes to `path` do not change `name`.

    Raises:
        UserError: `name` cannot be written.
    """
    try:
        try:
            hard_link(path, name)
        except OSError:  # a file system without hard links
            hard_link(path, name, make=shutil.copyfile)
    except OSError as error:
        raise UserError(f"{name} could not be written: {_reason_and_hint(error)}") from error


def hard_link(path: Path, name: Path, make: Callable[[Path, Path], Any] = os.link) -> None:
    """Replace `name` atomically by a hard link to `path`. Raises OSError, also if the file system has no hard links."""
    link = name.with_name(f".{name.name}.{os.getpid()}{UNFINISHED}")
    link.unlink(missing_ok=True)
    make(path, link)
    os.replace(link, name)
    # If both names are the same file already, os.replace does nothing.
    link.unlink(missing_ok=True)


def make_folder(folder: Path, name: str) -> None:
    """Create `folder` if it is absent, and check that files can be written into it.

    Raises:
        UserError: the folder is not writable; the message calls it `name`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}{UNFINISHED}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{name} {folder} cannot be written to: {error.strerror}") from None


def remove_unfinished(folder: Path) -> None:
    """Remove unfinished files of killed processes from `folder`; no process may be writing there now."""
    for path in folder.glob(f".*{UNFINISHED}"):
        path.unlink(missing_ok=True)


def _reason_and_hint(error: OSError) -> str:
    hint = " (is the disk full?)" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO) else ""
    return f"{error.strerror or error}{hint}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
