"""Reading files of strangers: nothing in them is run, and they take no more memory than their own size lets expect.

A pickle can name any function of any module to be called. `torch.load(weights_only=True)` refuses most of them, but
some that it allows reserve as much memory as the file says (`bytearray(10**10)`), it expands compressed records to any
size, and it advises to switch the check off. Here names are never looked up: each of the few that a file of arrays
needs stands for an inert object of ours.
"""

import os
import pickle
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NoReturn

LARGEST_FILE_VARIABLE = "GHOSTNET_LARGEST_FILE"
"""Environment variable: the largest file of weights that is read, in GiB."""
LARGEST_FILE = 2.0
LARGEST_COUNT = 2_000_000
"""Of instructions in a pickle, and of values that come out of it."""
LARGEST_TEXT = 1 << 29
"""Of all strings that come out of a pickle together, in characters."""
DEEPEST = 50
"""Of lists in lists in a pickle."""
LARGEST_DIRECTORY = 1 << 24
"""Of the list of records of a zip file, in bytes."""


class Unreadable(ValueError):
    """Why a file cannot be read; the message goes on after "weights file … cannot be read: "."""


# ---- sizes


def check_size(path: str | os.PathLike[str]) -> int:
    """The size of a regular file in bytes.

    Raises:
        Unreadable: it is no regular file, it is empty, or it is larger than `LARGEST_FILE_VARIABLE` allows.
        OSError: it is not there.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise Unreadable("it is not a regular file")
    text = os.environ.get(LARGEST_FILE_VARIABLE, str(LARGEST_FILE))
    try:
        limit = float(text) * 2**30
    except ValueError:
        raise Unreadable(f"the environment variable {LARGEST_FILE_VARIABLE}={text} is not a number (of GiB)") from None
    if status.st_size > limit:
        raise Unreadable(
            f"it has {status.st_size / 2**30:.1f} GiB, the limit is {text}; {LARGEST_FILE_VARIABLE}=… in the "
            "environment raises it"
        )
    if status.st_size == 0:
        raise Unreadable("it is empty")
    return status.st_size


def read_whole(path: Path) -> bytearray:
    """The content of a regular file. Raises Unreadable, see `check_size`."""
    content = bytearray(check_size(path))
    with path.open("rb") as file:
        if file.readinto(content) != len(content):
            raise Unreadable("it became shorter while it was read")
    return content


def zip_records(file: BinaryIO, size: int, *, largest_compressed: int = 0) -> list[zipfile.ZipInfo]:
    """The records of a zip file, after a check of the sizes that its directory tells, before any of them is read.

    Args:
        size: of the file.
        largest_compressed: how many bytes all compressed records together may expand to.

    Raises:
        Unreadable: no whole zip file, or one that expands to more than its own size.
    """
    file.seek(max(0, size - 98))
    tail = file.read().rjust(98, b"\0")
    if tail[-22:-18] != b"PK\x05\x06":
        raise Unreadable("it is truncated or damaged: its end is not that of a zip file")
    length, start = struct.unpack("<2L", tail[-10:-2])
    end = size - 22
    if tail[-42:-38] == b"PK\x06\x07":  # a zip file of 64 bits, as PyTorch writes them
        end = size - 98
        length, start = struct.unpack("<2Q", tail[-58:-42])
        if struct.unpack("<Q", tail[-34:-26]) != (end,):
            raise Unreadable("its directory is damaged")
    # Readers of zip files take different directories where these do not agree.
    if start + length != end:
        raise Unreadable("its directory is damaged")
    if length > LARGEST_DIRECTORY:
        raise Unreadable(f"its directory has {length:,} bytes, which no file of weights needs")
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError) as error:
        raise Unreadable(f"it is damaged ({error})") from None
    compressed = [record for record in records if record.compress_type != zipfile.ZIP_STORED]
    expanded = sum(record.file_size for record in compressed)
    if expanded > largest_compressed:
        raise Unreadable(
            f"{compressed[0].filename} in it is compressed and expands to {compressed[0].file_size:,} bytes; "
            f"{'files of torch.save are not compressed' if largest_compressed == 0 else 'that is too much'}"
        )
    if sum(record.file_size for record in records) - expanded > size:
        raise Unreadable("its records claim to be larger than the file")
    return records


# ---- pickles


def encode(text: str, encoding: str) -> bytes:
    """Stands for `_codecs.encode`, which pickles of protocol 2 call for bytes; knows Latin-1 alone."""
    if encoding not in ("latin1", "latin-1"):
        raise Unreadable(f"it asks for the codec {encoding!r}")
    return text.encode("latin-1")


def empty_dict(*pairs: object) -> dict[Any, Any]:
    """Stands for `OrderedDict`. A dict proper has no attributes that a pickle could set."""
    if pairs:
        raise Unreadable("it makes a dict of something")
    return {}


def empty_tuple(values: object = ()) -> tuple[Any, ...]:
    """Stands for `tuple` and `torch.Size`."""
    if not isinstance(values, list | tuple):
        raise Unreadable(f"it makes a tuple of a {type(values).__name__}")
    return tuple(values)


def is_shape(value: object) -> bool:
    """Whether it is a list or tuple of at most 16 sizes or strides."""
    return (
        isinstance(value, list | tuple)
        and len(value) <= 16
        and all(type(side) is int and 0 <= side < 2**63 for side in value)
    )


class Inert:
    """What a pickle may set a state of, by a method `__setstate__`, and what may come out of it."""


_NAMES = (
    "PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_DICT EMPTY_LIST "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID "
    "BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET"
)


class _Instructions(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> NoReturn:
        raise pickle.UnpicklingError(f"instruction {bytes([code])!r}")


# The unpickler written in Python: the one in C reserves as much memory as a damaged or hostile file says.
class PlainUnpickler(pickle._Unpickler):
    """Knows the instructions that plain values and arrays need, and the names of `ALLOWED`; refuses the rest."""

    ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        ("_codecs", "encode"): encode,
        ("collections", "OrderedDict"): empty_dict,
        ("builtins", "tuple"): empty_tuple,
        ("__builtin__", "tuple"): empty_tuple,  # protocol 2
    }
    KIND = "pickle of plain values"
    LEAVES: ClassVar[tuple[type, ...]] = (type(None), bool, int, float, Inert)
    dispatch = _Instructions()
    # Of the class above, which the types of the standard library do not tell.
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: BinaryIO, size: int) -> None:
        """size: of the file in bytes; what is made of its content takes a few times that."""
        # Latin-1: as PyTorch and Paddle read the files that their versions for Python 2 wrote.
        super().__init__(file, encoding="latin1")
        self.left, self.room = LARGEST_COUNT, size

    def load(self) -> Any:
        """The value.

        Raises:
            Unreadable: damaged, hostile, or too large.
        """
        try:
            value = super().load()
            self._check(value)
        except (Unreadable, MemoryError):
            raise
        except Exception as error:
            # A damaged pickle fails in whatever way its bytes happen to say: EOFError, IndexError, TypeError, …
            reason = (str(error) or type(error).__name__).splitlines()[0][:200]
            raise Unreadable(f"it is no {self.KIND}, or a damaged one ({reason})") from error
        return value

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise Unreadable(
                f"it asks for {f'{module}.{name}'[:100]}, which a file of weights does not need: it may be hostile; "
                "nothing in it was run"
            ) from None

    def load_append(self) -> None:
        self._add([self.stack.pop()])

    def load_appends(self) -> None:
        self._add(self.pop_mark())

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def load_reduce(self) -> None:
        # Text or a list may be used many times, and each use may copy it.
        self.room -= sum(len(value) for value in self.stack[-1] if isinstance(value, str | bytes | list | tuple))
        if self.room < 0:
            raise Unreadable("it makes more of its content than a file of weights needs")
        super().load_reduce()  # type: ignore[misc]

    def load_build(self) -> None:
        state = self.stack.pop()
        # Of a state dict it is `_metadata`, the versions of modules. It is not needed, and could hold anything.
        if isinstance(self.stack[-1], Inert):
            self.stack[-1].__setstate__(state)  # type: ignore[attr-defined]
        elif not isinstance(self.stack[-1], dict):
            raise Unreadable("it sets a state where there is none")

    def _add(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise Unreadable("it is damaged (it appends to what is no list)")
        self.stack[-1].extend(values)

    def _set(self, values: list[Any]) -> None:
        # A tuple as a key is hashed as a whole, which may take for ever.
        keys = values[::2]
        if type(self.stack[-1]) is not dict or any(type(key) not in (str, int, float, bool) for key in keys):
            raise Unreadable("it is damaged, or has a dict whose keys are no plain values")
        self.stack[-1].update(zip(keys, values[1::2], strict=True))

    def _check(self, value: Any) -> None:
        """Lists that hold one list many times, which does so in turn, are small here, and endless to who reads them."""
        count, text = LARGEST_COUNT, LARGEST_TEXT
        level = [value]
        for _ in range(DEEPEST):
            below: list[Any] = []
            for value in level:
                if type(value) in (list, tuple):
                    below.extend(value)
                elif type(value) is dict:
                    below.extend(value)
                    below.extend(value.values())
                elif type(value) in (str, bytes):
                    text -= len(value)
                elif not isinstance(value, self.LEAVES):
                    raise Unreadable(f"it holds a {type(value).__name__}")
                count -= 1
                if count < len(below) or text < 0:
                    raise Unreadable("it holds more values than a file of weights needs")
            if not below:
                return
            level = below
        raise Unreadable(f"it holds lists in lists, more than {DEEPEST} deep")


def _counted(instruction: Callable[[Any], None]) -> Callable[[Any], None]:
    def run(unpickler: PlainUnpickler) -> None:
        unpickler.left -= 1
        if unpickler.left < 0:
            raise Unreadable("it holds more values than a file of weights needs")
        instruction(unpickler)

    return run


for _name in _NAMES.split():
    _code = getattr(pickle, _name)[0]
    _method = getattr(PlainUnpickler, pickle._Unpickler.dispatch[_code].__name__)
    PlainUnpickler.dispatch[_code] = _counted(_method)
