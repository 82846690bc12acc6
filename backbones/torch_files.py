"""Reads what `torch.save` wrote, the zip files of today and the older format before PyTorch 1.6; see `untrusted`."""

import io
import zipfile
import zlib
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

from backbones.untrusted import PlainUnpickler, Unreadable, check_size, empty_tuple, is_shape, read_whole, zip_records

LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
"""How files of the older format begin: two pickles, of a magic number and of a version."""
LARGEST_PICKLE = 1 << 28
STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
Storage = Callable[[str, torch.dtype, int], Tensor]
"""(key, type, number of elements) -> the numbers that several tensors may be views of."""


def read_torch_file(path: Path) -> Any:
    """The content of a file of `torch.save`: dicts, lists, tuples, plain values, and tensors on the CPU.

    Raises:
        Unreadable: not such a file, damaged, too large, or with anything else in it. Nothing in it is run.
        OSError: it cannot be opened.
    """
    check_size(path)
    with path.open("rb") as file:
        begin = file.read(len(LEGACY))
    if begin == LEGACY:
        return _read_legacy(read_whole(path))
    if not begin.startswith(b"PK"):
        raise Unreadable("it is no file of torch.save")
    return _read_zip(path)


class _TorchUnpickler(PlainUnpickler):
    KIND = "file of torch.save"
    LEAVES: ClassVar[tuple[type, ...]] = (*PlainUnpickler.LEAVES, Tensor)

    def __init__(self, file: BinaryIO, size: int, storage: Storage) -> None:
        super().__init__(file, size)
        self._storage = storage

    def persistent_load(self, pid: Any) -> Tensor:
        # Older files have a sixth part: None, or what is a view of another storage.
        what, dtype, key, _, count, *view = pid
        if what != "storage" or not isinstance(dtype, torch.dtype) or type(key) is not str or view not in ([], [None]):
            raise Unreadable("it holds something else than tensors")
        if not is_shape([count]):
            raise Unreadable("it is damaged (an array without a size)")
        return self._storage(key, dtype, count)


def _tensor(storage: Tensor, offset: int, size: Any, stride: Any, *_: object) -> Tensor:
    """Stands for torch's `_rebuild_tensor_v2`. A tensor has no more elements than its storage: strides of zero could
    make as many as one likes of it."""
    if not (isinstance(storage, Tensor) and is_shape([offset]) and is_shape(size) and is_shape(stride)):
        raise Unreadable("it is damaged (a tensor without a shape)")
    count = prod(size)
    last = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
    if count > storage.numel() or (count and last >= storage.numel()):
        raise Unreadable(f"a tensor of shape {list(size)} is larger than its {storage.numel()} numbers in the file")
    return torch.as_strided(storage, size, stride, offset)


def _parameter(data: Tensor, *_: object) -> Tensor:
    return data


_TorchUnpickler.ALLOWED = {
    **PlainUnpickler.ALLOWED,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): empty_tuple,
    **{(module, name): dtype for module in ("torch", "torch.cuda") for name, dtype in STORAGES.items()},
}


def _from_bytes(content: memoryview, dtype: torch.dtype) -> Tensor:
    """A tensor in the memory of `content`, or a copy where numbers may not lie at its address."""
    if not content:
        return torch.empty(0, dtype=dtype)
    tensor = torch.frombuffer(content, dtype=torch.uint8)
    return (tensor if tensor.data_ptr() % dtype.itemsize == 0 else tensor.clone()).view(dtype)


def _read_zip(path: Path) -> Any:
    with path.open("rb") as file:
        records = zip_records(file, path.stat().st_size)
    content = memoryview(read_whole(path))
    # All lie in one folder, whose name the writer chose.
    named = {record.filename.partition("/")[2]: record for record in records}
    if "constants.pkl" in named:
        raise Unreadable("it is a program (TorchScript or torch.export), no file of torch.save")
    if "data.pkl" not in named:
        raise Unreadable("it is a zip file, but not one of torch.save")
    if "byteorder" in named and _record(content, named["byteorder"]) != b"little":
        raise Unreadable("it was written by a machine of another byte order")
    storages: dict[str, Tensor] = {}

    def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
        if key not in storages:
            record = named.get(f"data/{key}")
            if record is None or record.file_size != count * dtype.itemsize:
                raise Unreadable(f"the numbers of array {key[:20]} are not all in it")
            storages[key] = _from_bytes(_record(content, record), dtype)
        if storages[key].dtype != dtype:
            raise Unreadable(f"array {key[:20]} is of two types")
        return storages[key]

    values = _record(content, named["data.pkl"])
    if len(values) > LARGEST_PICKLE:
        raise Unreadable(f"data.pkl in it has {len(values):,} bytes, the limit is {LARGEST_PICKLE:,}")
    return _TorchUnpickler(io.BytesIO(values), len(values), storage).load()


def _record(content: memoryview, record: zipfile.ZipInfo) -> memoryview:
    # Before each record its name is repeated, and room is left so that numbers lie at round addresses.
    head = content[record.header_offset : record.header_offset + 30]
    begin = record.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    found = content[begin : begin + record.file_size]
    if len(found) != record.file_size or zlib.crc32(found) != record.CRC:
        raise Unreadable(f"it is damaged: {record.filename[:100]} in it has a wrong checksum")
    return found


def _read_legacy(content: bytearray) -> Any:
    file = io.BytesIO(content)
    file.seek(len(LEGACY))
    size = len(content)
    storages: dict[str, Tensor] = {}

    def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
        # The numbers come after the tensors in the file.
        if key not in storages:
            if sum(made.nbytes for made in storages.values()) + count * dtype.itemsize > size:
                raise Unreadable("its arrays claim to be larger than the file")
            storages[key] = torch.empty(count, dtype=dtype)
        if (storages[key].dtype, storages[key].numel()) != (dtype, count):
            raise Unreadable(f"array {key[:20]} is of two types")
        return storages[key]

    system = PlainUnpickler(file, size).load()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Unreadable("it was written by a machine of another byte order, or is damaged")
    values = _TorchUnpickler(file, size, storage).load()
    keys = PlainUnpickler(file, size).load()
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise Unreadable("it is damaged (its arrays are not those that it lists)")
    for key in keys:
        target = storages[key]
        numbers = file.read(8 + target.nbytes)
        if len(numbers) != 8 + target.nbytes or int.from_bytes(numbers[:8], "little") != target.numel():
            raise Unreadable("it is truncated")
        target.copy_(_from_bytes(memoryview(bytearray(numbers))[8:], target.dtype))
    return values
