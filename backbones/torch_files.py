"""Reads files of `torch.save` by `torch.load(weights_only=True)`, after a look at what loading them would take.

`weights_only` runs no code of a file. But it expands compressed records to any size, reserves as much memory as a
pickle says (`bytearray(10**10)`), passes over checksums, and its messages advise to switch it off.
"""

import io
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from backbones.file_limits import Unreadable, check_size, zip_records

LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""How files of the format before PyTorch 1.6 begin: the pickle of a magic number."""
LEGACY_PICKLES = 5
"""What such files begin with: magic number, version, system, content, keys."""
LARGEST_PICKLE = 1 << 28
LARGEST_COUNT = 2_000_000
"""Of instructions in a pickle, and of values that come out of it."""
LARGEST_TEXT = 1 << 29
"""Of all strings that come out of a pickle together, in characters."""
DEEPEST_TUPLE = 8
DEEPEST = 50
"""Of lists in lists."""
RESERVES_MEMORY = re.compile(r"(builtins|__builtin__) bytearray|torch(\.cuda)? \w+Tensor")
"""Names that `weights_only` allows and a file of weights does not need: they reserve memory of any size."""


def read_torch_file(path: Path) -> Any:
    """The content of a file of `torch.save`, tensors on the CPU.

    Raises:
        Unreadable: not such a file, damaged, too large, or with more than plain values and tensors. Nothing in it is
            run.
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
            raise Unreadable("it is no file of torch.save")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        # A damaged file fails in whatever way its bytes happen to say.
        text = str(error)
        refused = re.search(r"(?:global|GLOBAL|class|function) ([\w.]+\.\w+)", text)
        if "weights_only" in text and refused:
            raise Unreadable(_asks_for(refused[1])) from error
        reason = "it holds more than plain values and tensors" if "weights_only" in text else _first_line(error)
        raise Unreadable(f"it is no file of torch.save, or a damaged one ({reason})") from error
    _check_values(content)
    return content


def _check_zip(file: BinaryIO, size: int) -> None:
    records = zip_records(file, size)
    # All lie in one folder, whose name the writer chose.
    named = {record.filename.partition("/")[2]: record for record in records}
    if "constants.pkl" in named:
        raise Unreadable("it is a program (TorchScript or torch.export), no file of torch.save")
    if "data.pkl" not in named:
        raise Unreadable("it is a zip file, but not one of torch.save")
    if (length := named["data.pkl"].file_size) > LARGEST_PICKLE:
        raise Unreadable(f"data.pkl in it has {length:,} bytes, the limit is {LARGEST_PICKLE:,}")
    try:
        with zipfile.ZipFile(file) as archive:
            if (damaged := archive.testzip()) is not None:
                raise Unreadable(f"it is damaged: {damaged[:100]} in it has a wrong checksum")
            _check_pickle(io.BytesIO(archive.read(named["data.pkl"])))
    except (zipfile.BadZipFile, EOFError) as error:
        raise Unreadable(f"it is damaged ({error})") from None


def _check_legacy(file: BinaryIO) -> None:
    file.seek(0)
    for _ in range(LEGACY_PICKLES):
        _check_pickle(file)


def _check_pickle(file: BinaryIO) -> None:
    """Raise Unreadable where loading the pickle at the file's position would reserve memory of any size."""
    count = calls = longest = inner = made = 0
    depths: dict[Any, int] = {}
    try:
        for instruction, argument, _ in pickletools.genops(file):
            count += 1
            if count > LARGEST_COUNT:
                raise Unreadable("it holds more values than a file of weights needs")
            # A tuple that holds one tuple twice, which does so in turn, is hashed for ever as the key of a dict.
            if instruction.name.startswith("TUPLE"):
                made = 1 + inner
            elif instruction.name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
                depths[len(depths) if argument is None else argument] = made
                inner = made = 0
            elif instruction.name in ("BINGET", "LONG_BINGET", "GET"):
                inner = max(inner, depths.get(argument, 0))
                if inner > DEEPEST_TUPLE:
                    raise Unreadable("it holds tuples in tuples, deeper than a file of weights needs")
            # Each call may make bytes of one text (_codecs.encode).
            calls += instruction.name == "REDUCE"
            longest = max(longest, len(argument)) if isinstance(argument, str) else longest
            if calls * longest > LARGEST_TEXT:
                raise Unreadable("it makes more of its text than a file of weights needs")
            if instruction.name == "GLOBAL" and RESERVES_MEMORY.fullmatch(str(argument)):
                raise Unreadable(_asks_for(str(argument).replace(" ", ".")))
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(f"it is no file of torch.save, or a damaged one ({_first_line(error)})") from error


def _check_values(value: Any) -> None:
    """Lists that hold one list many times, which does so in turn, are small here, and endless to who reads them."""
    count, text = LARGEST_COUNT, LARGEST_TEXT
    level = [value]
    for _ in range(DEEPEST):
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
                # Strides of zero make any number of elements of one.
                raise Unreadable(f"a tensor of shape {list(value.shape)} is larger than its numbers in the file")
            count -= 1
            if count < len(below) or text < 0:
                raise Unreadable("it holds more values than a file of weights needs")
        if not below:
            return
        level = below
    raise Unreadable(f"it holds lists in lists, more than {DEEPEST} deep")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _asks_for(name: str) -> str:
    return f"it asks for {name[:100]}, which a file of weights does not need: it may be hostile; nothing in it was run"
