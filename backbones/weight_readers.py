"""Readers of weight files that other frameworks write, without those frameworks and without running anything in them.

PaddlePaddle's `.pdparams` is a pickle, and a pickle can name any function of any module to be called. Here names
are never looked up: the six that a file of arrays needs stand for the inert objects below, every other is refused.
Not even NumPy's own `dtype` and `ndarray` are handed out, since what they take from a pickle they trust.
MindSpore's `.ckpt` is a protocol buffer of three small messages, read here field by field.
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

from backbones.file_limits import Unreadable, read_whole

NUMBERS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
"""NumPy's type codes of plain numbers; objects, text and records are none."""

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


class _Dtype:
    """Stands for `numpy.dtype`: remembers a type code of plain numbers."""

    def __init__(self, code: str, *flags: object) -> None:
        if code not in NUMBERS:
            raise Unreadable(f"it holds an array of type {code!r}, which is no plain number")
        self.code = code
        self.order = "="

    def __setstate__(self, state: Any) -> None:
        _, order, *record = state
        if order not in "<>|=" or any(part is not None for part in record[:3]):
            raise Unreadable("it holds an array of records")
        self.order = order


class _Array:
    """Stands for `numpy.ndarray`: remembers shape, type and bytes as they stand in the file."""

    def __init__(self, *arguments: object) -> None:
        self.state: tuple[Any, ...] | None = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    @property
    def size(self) -> int:
        """Of the content, in bytes."""
        return len(self.state[4]) if self.state is not None else 0

    def tensor(self) -> Tensor:
        if self.state is None:
            raise Unreadable("it holds an array without content")
        _, shape, dtype, fortran, content = self.state
        if not isinstance(dtype, _Dtype) or not isinstance(content, bytes):
            raise Unreadable("it holds an array that is not made of bytes")
        code = dtype.order + dtype.code
        return _tensor(content, code, shape, "F" if fortran else "C", bfloat16=dtype.code == "u2")


class _Inert:
    """A pickle can set attributes of whatever it was given; with this method, of these classes it cannot."""

    def __setstate__(self, state: Any) -> None:
        raise Unreadable("it sets a state where there is none")


class _Encode(_Inert):
    """Stands for `_codecs.encode`, which pickles of protocol 2 call for the bytes of an array; knows Latin-1 alone."""

    def __new__(cls, text: str, encoding: str) -> bytes:  # type: ignore[misc]
        if encoding not in ("latin1", "latin-1"):
            raise Unreadable(f"it asks for the codec {encoding!r}")
        return text.encode("latin-1")


class _Reconstruct(_Inert):
    """Stands for NumPy's `_reconstruct(ndarray, (0,), b"b")`, an empty array that a state is set on."""

    def __new__(cls, *arguments: object) -> _Array:  # type: ignore[misc]
        return _Array()


# The unpickler written in Python: the one in C reserves as much memory as a damaged or hostile file says.
class _PaddleUnpickler(pickle._Unpickler):
    ALLOWED = {  # noqa: RUF012
        ("numpy", "dtype"): _Dtype,
        ("numpy", "ndarray"): _Array,
        ("numpy.core.multiarray", "_reconstruct"): _Reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _Reconstruct,  # NumPy 2
        ("_codecs", "encode"): _Encode,
        # Plain containers. A dict proper has no attributes that a pickle could set.
        ("collections", "OrderedDict"): dict,
        ("builtins", "tuple"): tuple,
        ("__builtin__", "tuple"): tuple,  # protocol 2
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise Unreadable(
                f"it asks for {module}.{name}, which a file of weights does not need: it may be hostile; "
                "nothing in it was run"
            ) from None


def read_pdparams(path: Path) -> dict[str, Tensor]:
    """Read what `paddle.save(layer.state_dict(), path)` wrote (pickle protocols 2 to 4).

    Returns:
        name -> tensor; what is no array (Paddle's table `StructuredToParameterName@@` of its internal names) is
        left out. Unsigned 16-bit arrays are bfloat16, as Paddle stores them, and become float32.

    Raises:
        Unreadable: not such a file, or one that asks for anything but arrays. Nothing in it is run.
        OSError: it cannot be opened.
    """
    content = read_whole(path)
    try:
        # Latin-1: as Paddle reads the files that its versions for Python 2 wrote.
        entries = _PaddleUnpickler(io.BytesIO(content), encoding="latin1").load()
        if not isinstance(entries, dict):
            raise Unreadable(f"it holds a {type(entries).__name__}, not a dict of arrays")
        state_dict: dict[str, Tensor] = {}
        tensors: dict[_Array, Tensor] = {}
        room = len(content)
        for name, value in entries.items():
            # (internal name, array): how Paddle writes the tensors of a dict that holds other things, too.
            if isinstance(value, tuple) and len(value) == 2:
                value = value[1]
            if not isinstance(value, _Array):
                continue
            if value not in tensors:
                # Many arrays of the same bytes would be as many copies.
                room -= value.size
                if room < 0:
                    raise Unreadable("its arrays claim to be larger than the file")
                tensors[value] = value.tensor()
            state_dict[str(name)] = tensors[value]
    except Unreadable:
        raise
    except Exception as error:
        # A damaged pickle fails in whatever way its bytes happen to say: EOFError, IndexError, TypeError, …
        reason = str(error) or type(error).__name__
        raise Unreadable(f"it is no file of paddle.save, or a damaged one ({reason})") from error
    return state_dict


# ---- MindSpore


def is_mindspore(path: Path) -> bool:
    """Whether the file starts like a MindSpore checkpoint; PyTorch Lightning's `.ckpt` is a zip file or a pickle."""
    with path.open("rb") as file:
        return file.read(1) == b"\x0a"


def read_mindspore(path: Path) -> dict[str, Tensor]:
    """Read what `mindspore.save_checkpoint(net, path)` wrote.

        Checkpoint { repeated Value value = 1 }     Value { string tag = 1; TensorProto tensor = 2 }
        TensorProto { repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3 }

    Large tensors come in several values of the same tag. A checksum at the end, where there is one, is verified.

    Returns:
        tag -> tensor; text and hash maps are left out; bfloat16 becomes float32.

    Raises:
        Unreadable: truncated, damaged, encrypted, or no such file.
        OSError: it cannot be opened.
    """
    content = memoryview(read_whole(path))
    if content[-17:-10] == b"crc_num":
        expected = int.from_bytes(content[-10:], "big")
        content = content[:-17]
        if zlib.crc32(content) != expected:
            raise Unreadable("its checksum is wrong: the file is damaged")
    chunks: dict[str, tuple[list[int], str, list[memoryview]]] = {}
    for number, entry in protobuf_fields(content):
        if number != 1 or isinstance(entry, int):
            raise Unreadable(f"field {number} is no part of a MindSpore checkpoint")
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
            raise Unreadable(f"{tag} has the type {kind!r}, which is not known here")
        # Older versions write the shape of a scalar as [0].
        shape = [] if dims == [0] else dims
        try:
            state_dict[tag] = _tensor(b"".join(pieces), MINDSPORE_TYPES[kind], shape, bfloat16=kind == "BFloat16")
        except Unreadable as error:
            raise Unreadable(f"{tag}: {error}") from None
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
            raise Unreadable(f"field {number} is no part of a MindSpore tensor")
    return dims, kind, data


def _text(content: memoryview) -> str:
    try:
        return str(content, "utf-8")
    except UnicodeDecodeError:
        raise Unreadable("it is no MindSpore checkpoint, or a damaged or encrypted one") from None


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
                raise Unreadable("it is truncated")
            yield number, message[position : position + value]
            position += value
        else:
            raise Unreadable("it is no MindSpore checkpoint, or a damaged or encrypted one")


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """An integer of seven bits a byte, lowest first; the top bit says that more follow. At most 64 bits."""
    value = 0
    for index in range(10):
        if position + index >= len(message):
            raise Unreadable("it is truncated")
        byte = message[position + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise Unreadable("it is no MindSpore checkpoint, or a damaged or encrypted one")


# ---- both


def _tensor(content: bytes, code: str, shape: Any, order: Any = "C", *, bfloat16: bool = False) -> Tensor:
    """Bytes -> a tensor of its own memory. Half precision becomes float32."""
    if not all(isinstance(side, int) and 0 <= side < 2**63 for side in shape):
        raise Unreadable(f"{shape} is no shape")
    dtype = np.dtype(code)
    if prod(shape) * dtype.itemsize != len(content):
        raise Unreadable(f"{len(content)} bytes do not make an array {list(shape)} of {dtype}")
    array = np.frombuffer(content, dtype).reshape(tuple(shape), order=order)
    native = np.array(array, dtype.newbyteorder("="), order="C")
    if bfloat16:
        return torch.from_numpy(native.view(np.int16)).view(torch.bfloat16).float()
    tensor = torch.from_numpy(native)
    return tensor.float() if tensor.dtype == torch.float16 else tensor
