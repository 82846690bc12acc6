"""Reads files of `torch.save` with `torch.load(weights_only=True)`, after checks of their size and structure.

`weights_only` runs no code of a file. But it expands compressed records to any size, allocates as much memory as a
pickle requests (`bytearray(10**10)`), ignores checksums, and its error messages advise switching it off.
"""

import io
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from backbones.file_limits import UnreadableFile, check_size, read_zip_directory

LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""First bytes of a file in the format before PyTorch 1.6: the pickle of a magic number."""
LEGACY_PICKLES = 5
"""Pickles at the start of such a file: magic number, version, system, content, keys."""
MAX_PICKLE_SIZE = 1 << 28
MAX_VALUES = 2_000_000
"""Largest number of instructions in a pickle, and of values in its content."""
MAX_TEXT = 1 << 29
"""Largest total length of all strings in the content of a pickle, in characters."""
MAX_TUPLE_DEPTH = 8
MAX_DEPTH = 50
"""Largest nesting depth of lists."""
ALLOCATING_NAMES = re.compile(r"(builtins|__builtin__) bytearray|torch(\.cuda)? \w+Tensor")
"""Names that `weights_only` allows but no weight file needs: they allocate memory of any size."""


def read_torch_file(path: Path) -> Any:
    """The content of a file of `torch.save`, with tensors on the CPU.

    Raises:
        UnreadableFile: the file is of another kind, damaged, too large, or holds more than plain values and tensors. No
            code in it is run.
        OSError: it cannot be opened.
    """
    size = check_size(path)
    with path.open("rb") as file:
        begin = file.read(len(LEGACY))
        if begin.startswith(b"PK"):
            _check_zip(file, size)
        elif begin == LEGACY:
            _check_legacy(file)
        else:
            raise UnreadableFile("it is not a file of torch.save")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        # A damaged file can raise any exception.
        text = str(error)
        refused = re.search(r"(?:global|GLOBAL|class|function) ([\w.]+\.\w+)", text)
        if "weights_only" in text and refused:
            raise UnreadableFile(_asks_for(refused[1])) from error
        reason = "it holds more than plain values and tensors" if "weights_only" in text else _first_line(error)
        raise UnreadableFile(f"it is not a file of torch.save, or it is damaged ({reason})") from error
    _check_values(content)
    return content


def _check_zip(file: BinaryIO, size: int) -> None:
    records = read_zip_directory(file, size)
    # All records are in one folder, whose name the writer chose.
    named = {record.filename.partition("/")[2]: record for record in records}
    if "constants.pkl" in named:
        raise UnreadableFile("it is a program (TorchScript or torch.export), not a file of torch.save")
    if "data.pkl" not in named:
        raise UnreadableFile("it is a zip file, but not one of torch.save")
    if (length := named["data.pkl"].file_size) > MAX_PICKLE_SIZE:
        raise UnreadableFile(f"data.pkl in it has {length:,} bytes, the limit is {MAX_PICKLE_SIZE:,}")
    try:
        with zipfile.ZipFile(file) as archive:
            if (damaged := archive.testzip()) is not None:
                raise UnreadableFile(f"it is damaged: {damaged[:100]} in it has a wrong checksum")
            _check_pickle(io.BytesIO(archive.read(named["data.pkl"])))
    except (zipfile.BadZipFile, EOFError) as error:
        raise UnreadableFile(f"it is damaged ({error})") from None


def _check_legacy(file: BinaryIO) -> None:
    file.seek(0)
    for _ in range(LEGACY_PICKLES):
        _check_pickle(file)


def _check_pickle(file: BinaryIO) -> None:
    """Raise UnreadableFile if loading the pickle at the file's position could allocate memory of any size."""
    count = calls = longest = inner = depth = 0
    depths: dict[Any, int] = {}
    try:
        for instruction, argument, _ in pickletools.genops(file):
            count += 1
            if count > MAX_VALUES:
                raise UnreadableFile("it holds more values than a file of weights needs")
            # A dict key of nested tuples that hold the same tuple twice takes exponential time to hash.
            if instruction.name.startswith("TUPLE"):
                depth = 1 + inner
            elif instruction.name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
                depths[len(depths) if argument is None else argument] = depth
                inner = depth = 0
            elif instruction.name in ("BINGET", "LONG_BINGET", "GET"):
                inner = max(inner, depths.get(argument, 0))
                if inner > MAX_TUPLE_DEPTH:
                    raise UnreadableFile("it holds tuples in tuples, deeper than a file of weights needs")
            # Each call may copy a text as bytes (_codecs.encode).
            calls += instruction.name == "REDUCE"
            longest = max(longest, len(argument)) if isinstance(argument, str) else longest
            if calls * longest > MAX_TEXT:
                raise UnreadableFile("it copies its text more often than a file of weights needs")
            if instruction.name == "GLOBAL" and ALLOCATING_NAMES.fullmatch(str(argument)):
                raise UnreadableFile(_asks_for(str(argument).replace(" ", ".")))
    except UnreadableFile:
        raise
    except Exception as error:
        raise UnreadableFile(f"it is not a file of torch.save, or it is damaged ({_first_line(error)})") from error


def _check_values(value: Any) -> None:
    """Raise UnreadableFile for content that expands endlessly, like nested lists that hold the same list many times."""
    count, text = MAX_VALUES, MAX_TEXT
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, list | tuple | set):
                below.extend(value)
            elif isinstance(value, dict):
                below.extend(value)
                below.extend(value.values())
            elif isinstance(value, str | bytes):
                text -= len(value)
            elif isinstance(value, Tensor) and value.numel() * value.element_size() > value.untyped_storage().nbytes():
                # With strides of zero, one stored number becomes any number of elements.
                raise UnreadableFile(f"a tensor of shape {list(value.shape)} is larger than its numbers in the file")
            count -= 1
            if count < len(below) or text < 0:
                raise UnreadableFile("it holds more values than a file of weights needs")
        if not below:
            return
        level = below
    raise UnreadableFile(f"it holds lists in lists, more than {MAX_DEPTH} deep")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _asks_for(name: str) -> str:
    return f"it asks for {name[:100]}, which a file of weights does not need: it may be hostile; nothing in it was run"
