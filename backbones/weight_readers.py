"""Reads weight files of other frameworks, without those frameworks and without running code in the files.

PaddlePaddle's `.pdparams` is a pickle, and a pickle can call any function of any module. Here names are never imported:
the six names that a file of arrays needs are replaced by the safe classes below; all others raise an error. NumPy's own
`dtype` and `ndarray` are not used either, because they trust the content of a pickle. MindSpore's `.ckpt` is a protocol
buffer of three small messages, read here field by field.
"""

import io
import pickle
import zlib
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backbones.file_limits import UnreadableFile, read_bytes

NUMERIC_TYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
"""NumPy's type codes of numbers; objects, text and records are not allowed."""

MINDSPORE_TYPES = {
    "Float16": "<f2",
    "Float32": "<f4",
    "Float64": "<f8",
    "BFloat16": "<u2",
    "Int8": "<i1",
    "Int16": "<i2",
    "Int32": "<i4",
    "Int64": "<i8",
    "UInt8": "<u1",
    "UInt16": "<u2",
    "UInt32": "<u4",
    "UInt64": "<u8",
    "Bool": "|b1",
}


# ---- PaddlePaddle


class _DtypeRecord:
    """Replaces `numpy.dtype`: stores a numeric type code."""

    def __init__(self, code: str, *flags: object) -> None:
        if code not in NUMERIC_TYPES:
            raise UnreadableFile(f"it holds an array of type {code!r}, which is not numeric")
        self.code = code
        self.order = "="

    def __setstate__(self, state: Any) -> None:
        _, order, *record = state
        if order not in "<>|=" or any(part is not None for part in record[:3]):
            raise UnreadableFile("it holds an array of records")
        self.order = order


class _ArrayRecord:
    """Replaces `numpy.ndarray`: stores shape, type and bytes as in the file."""

    def __init__(self, *arguments: object) -> None:
        self.state: tuple[Any, ...] | None = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    @property
    def size(self) -> int:
        """Size of the content in bytes."""
        return len(self.state[4]) if self.state is not None else 0

    def tensor(self) -> Tensor:
        if self.state is None:
            raise UnreadableFile("it holds an array without content")
        _, shape, dtype, fortran, content = self.state
        if not isinstance(dtype, _DtypeRecord) or not isinstance(content, bytes):
            raise UnreadableFile("it holds an array that is not made of bytes")
        code = dtype.order + dtype.code
        return _tensor(content, code, shape, "F" if fortran else "C", bfloat16=dtype.code == "u2")


class _Stateless:
    """Base class whose objects a pickle cannot set attributes on."""

    def __setstate__(self, state: Any) -> None:
        raise UnreadableFile("it sets the state of an object that has none")


class _Encode(_Stateless):
    """Replaces `_codecs.encode`, which pickles of protocol 2 call for the bytes of an array; supports only Latin-1."""

    def __new__(cls, text: str, encoding: str) -> bytes:  # type: ignore[misc]
        if encoding not in ("latin1", "latin-1"):
            raise UnreadableFile(f"it asks for the codec {encoding!r}")
        return text.encode("latin-1")


class _Reconstruct(_Stateless):
    """Replaces NumPy's `_reconstruct(ndarray, (0,), b"b")`, which creates an empty array whose state is set later."""

    def __new__(cls, *arguments: object) -> _ArrayRecord:  # type: ignore[misc]
        return _ArrayRecord()


# The pure-Python unpickler: the one in C allocates as much memory as a damaged or hostile file requests.
class _PaddleUnpickler(pickle._Unpickler):
    ALLOWED = {  # noqa: RUF012
        ("numpy", "dtype"): _DtypeRecord,
        ("numpy", "ndarray"): _ArrayRecord,
        ("numpy.core.multiarray", "_reconstruct"): _Reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _Reconstruct,  # NumPy 2
        ("_codecs", "encode"): _Encode,
        # Plain containers. A dict has no attributes that a pickle could set.
        ("collections", "OrderedDict"): dict,
        ("builtins", "tuple"): tuple,
        ("__builtin__", "tuple"): tuple,  # protocol 2
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise UnreadableFile(
                f"it asks for {module}.{name}, which a file of weights does not need: it may be hostile; "
                "nothing in it was run"
            ) from None


def read_pdparams(path: Path) -> dict[str, Tensor]:
    """Read a file of `paddle.save(layer.state_dict(), path)` (pickle protocols 2 to 4).

    Returns:
        name -> tensor. Other values (Paddle's table `StructuredToParameterName@@` of internal names) are skipped.
        Unsigned 16-bit arrays are bfloat16, as Paddle stores them, and become float32.

    Raises:
        UnreadableFile: the file is of another kind, or holds anything but arrays. No code in it is run.
        OSError: it cannot be opened.
    """
    content = read_bytes(path)
    try:
        # Latin-1, as Paddle reads the files of its versions for Python 2.
        entries = _PaddleUnpickler(io.BytesIO(content), encoding="latin1").load()
        if not isinstance(entries, dict):
            raise UnreadableFile(f"it holds a {type(entries).__name__}, not a dict of arrays")
        state_dict: dict[str, Tensor] = {}
        tensors: dict[_ArrayRecord, Tensor] = {}
        remaining = len(content)
        for name, value in entries.items():
            # (internal name, array): Paddle's format for the tensors of a dict that also holds other values.
            if isinstance(value, tuple) and len(value) == 2:
                value = value[1]
            if not isinstance(value, _ArrayRecord):
                continue
            if value not in tensors:
                # Many arrays of the same bytes would become as many copies.
                remaining -= value.size
                if remaining < 0:
                    raise UnreadableFile("its arrays claim to be larger than the file")
                tensors[value] = value.tensor()
            state_dict[str(name)] = tensors[value]
    except UnreadableFile:
        raise
    except Exception as error:
        # A damaged pickle can raise any exception: EOFError, IndexError, TypeError, …
        reason = str(error) or type(error).__name__
        raise UnreadableFile(f"it is not a file of paddle.save, or it is damaged ({reason})") from error
    return state_dict


# ---- MindSpore


def is_mindspore(path: Path) -> bool:
    """Whether the file starts like a MindSpore checkpoint; PyTorch Lightning's `.ckpt` is a zip file or a pickle."""
    with path.open("rb") as file:
        return file.read(1) == b"\x0a"


def read_mindspore(path: Path) -> dict[str, Tensor]:
    """Read a file of `mindspore.save_checkpoint(net, path)`.

        Checkpoint { repeated Value value = 1 }     Value { string tag = 1; TensorProto tensor = 2 }
        TensorProto { repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3 }

    Large tensors are split into several values with the same tag. The checksum at the end is verified, if there is one.

    Returns:
        tag -> tensor; text and hash maps are skipped; bfloat16 becomes float32.

    Raises:
        UnreadableFile: the file is truncated, damaged, encrypted, or of another kind.
        OSError: it cannot be opened.
    """
    content = memoryview(read_bytes(path))
    if content[-17:-10] == b"crc_num":
        expected = int.from_bytes(content[-10:], "big")
        content = content[:-17]
        if zlib.crc32(content) != expected:
            raise UnreadableFile("its checksum is wrong: the file is damaged")
    chunks: dict[str, tuple[list[int], str, list[memoryview]]] = {}
    for number, entry in protobuf_fields(content):
        if number != 1 or isinstance(entry, int):
            raise UnreadableFile(f"field {number} does not belong to a MindSpore checkpoint")
        parts = {key: part for key, part in protobuf_fields(entry) if not isinstance(part, int)}
        tag, tensor = _text(parts.get(1, content[:0])), parts.get(2)
        if tensor is None:
            continue
        dims, kind, data = _mindspore_tensor(tensor)
        chunks.setdefault(tag, (dims, kind, []))[2].append(data)
    state_dict = {}
    for tag, (dims, kind, pieces) in chunks.items():
        if kind == "str":
            continue
        if kind not in MINDSPORE_TYPES:
            raise UnreadableFile(f"{tag} has the unknown type {kind!r}")
        # Older versions write the shape of a scalar as [0].
        shape = [] if dims == [0] else dims
        try:
            state_dict[tag] = _tensor(b"".join(pieces), MINDSPORE_TYPES[kind], shape, bfloat16=kind == "BFloat16")
        except UnreadableFile as error:
            raise UnreadableFile(f"{tag}: {error}") from None
    return state_dict


def _mindspore_tensor(message: memoryview) -> tuple[list[int], str, memoryview]:
    dims: list[int] = []
    kind, data = "", message[:0]
    for number, value in protobuf_fields(message):
        if number == 1 and isinstance(value, int):
            dims.append(value)
        elif number == 2 and not isinstance(value, int):
            kind = _text(value)
        elif number == 3 and not isinstance(value, int):
            data = value
        else:
            raise UnreadableFile(f"field {number} does not belong to a MindSpore tensor")
    return dims, kind, data


def _text(content: memoryview) -> str:
    try:
        return str(content, "utf-8")
    except UnicodeDecodeError:
        raise UnreadableFile("it is not a MindSpore checkpoint, or it is damaged or encrypted") from None


def protobuf_fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a protocol buffer message in order: (number, integer or bytes)."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        value, position = _varint(message, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            yield number, value
        elif wire_type == 2:
            if position + value > len(message):
                raise UnreadableFile("it is truncated")
            yield number, message[position : position + value]
            position += value
        else:
            raise UnreadableFile("it is not a MindSpore checkpoint, or it is damaged or encrypted")


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """Decode an integer of seven bits per byte, lowest first; the top bit marks that more follow. At most 64 bits."""
    value = 0
    for index in range(10):
        if position + index >= len(message):
            raise UnreadableFile("it is truncated")
        byte = message[position + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise UnreadableFile("it is not a MindSpore checkpoint, or it is damaged or encrypted")


# ---- both


def _tensor(content: bytes, code: str, shape: Any, order: Any = "C", *, bfloat16: bool = False) -> Tensor:
    """Copy bytes into a tensor. Half precision becomes float32."""
    if not all(isinstance(side, int) and 0 <= side < 2**63 for side in shape):
        raise UnreadableFile(f"{shape} is not a shape")
    dtype = np.dtype(code)
    if prod(shape) * dtype.itemsize != len(content):
        raise UnreadableFile(f"{len(content)} bytes do not make an array {list(shape)} of {dtype}")
    array = np.frombuffer(content, dtype).reshape(tuple(shape), order=order)
    native = np.array(array, dtype.newbyteorder("="), order="C")
    if bfloat16:
        return torch.from_numpy(native.view(np.int16)).view(torch.bfloat16).float()
    tensor = torch.from_numpy(native)
    return tensor.float() if tensor.dtype == torch.float16 else tensor
