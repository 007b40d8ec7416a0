"""safetensors files: a header that is checked before anything is read, one tensor read at a time.

    8 bytes  length of the header, little-endian
    header   JSON: name -> {"dtype", "shape", "data_offsets"}, and "__metadata__"
    data     the tensors, without gaps or overlaps

The file is read through one descriptor, so that what was checked is what is read, with pread, so
that a file which is cut short meanwhile is an error rather than a bus error.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import AdapterError, shown
from .strict_json import parse_json

MAX_HEADER_BYTES = 32 << 20
_MAX_DIMS = 8
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    Attributes:
        name: its key.
        dtype: its dtype.
        shape: its shape.
        start: where its bytes begin in the file.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(descriptor: int) -> dict[str, Entry]:
    """The tensors that a safetensors file holds, by name.

    Raises:
        AdapterError: the file is cut short, is no safetensors file, or its header contradicts
            itself or the file's length.
    """
    size = os.fstat(descriptor).st_size
    if size < 8:
        raise AdapterError(f"expected a safetensors file, but it has {size} bytes")
    length = int.from_bytes(_pread(descriptor, 8, 0), "little")
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise AdapterError(
            f"expected a safetensors header of at most {min(size - 8, MAX_HEADER_BYTES)} bytes, "
            f"but its length says {length}; the file is cut short or is no safetensors file"
        )
    header = _pread(descriptor, length, 8)
    if header[:1] != b"{":
        raise AdapterError("expected a safetensors header, but it does not begin with '{'")
    table = parse_json(bytes(header), max_depth=4)
    _check_metadata(table.pop("__metadata__", {}))
    entries = []
    end = 0
    spans = [(*_checked_span(name, entry), name) for name, entry in table.items()]
    for begin, stop, name in sorted(spans):
        if begin != end:
            raise AdapterError(
                f"{shown(name, 200)}: expected its data at {end}, but data_offsets say {begin}; "
                "tensors overlap or leave a gap"
            )
        end = stop
        entries.append(_entry(name, table[name], 8 + length + begin, stop - begin))
    if end != size - 8 - length:
        raise AdapterError(
            f"expected {end} bytes of data, but the file has {size - 8 - length}; it is cut short "
            "or has something appended"
        )
    return {entry.name: entry for entry in entries}


def read_tensor(descriptor: int, entry: Entry) -> Tensor:
    """The tensor, on the CPU.

    Raises:
        AdapterError: the file was cut short since its header was read.
    """
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=entry.dtype)
    data = _pread(descriptor, entry.nbytes, entry.start)
    return torch.frombuffer(data, dtype=entry.dtype).reshape(entry.shape)


def encode(tensors: Mapping[str, Tensor]) -> Iterator[memoryview | bytes]:
    """The pieces of a safetensors file with the metadata that PEFT writes.

    Args:
        tensors: by name; contiguous, on the CPU, and not written to meanwhile.
    """
    # Wide elements first, as the safetensors library orders them: all data stays aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        if tensors[name].nbytes:
            yield _bytes_of(tensors[name])


def is_storable(dtype: torch.dtype) -> bool:
    return dtype in _NAMES


def _bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's own memory; valid while the tensor lives."""
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def _pread(descriptor: int, count: int, start: int) -> bytearray:
    data = bytearray(count)
    done = 0
    while done < count:
        got = os.preadv(descriptor, [memoryview(data)[done : done + (1 << 30)]], start + done)
        if not got:
            raise AdapterError(f"expected {count} bytes at {start}, but the file is cut short")
        done += got
    return data


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise AdapterError(
            f"expected __metadata__ to be an object of strings, but got {shown(metadata)}"
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _checked_span(name: str, entry: Any) -> tuple[int, int]:
    """data_offsets, after the checks of the entry's form."""
    where = shown(name, 200)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise AdapterError(
            f"{where}: expected an object of dtype, shape and data_offsets, but got {shown(entry)}"
        )
    shape, span = entry["shape"], entry["data_offsets"]
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
        raise AdapterError(
            f"{where}: expected dtype to be one of {', '.join(_DTYPES)}, but got "
            f"{shown(entry['dtype'])}"
        )
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(map(_is_count, shape)):
        raise AdapterError(f"{where}: expected a shape of sizes, but got {shown(shape)}")
    if not isinstance(span, list) or len(span) != 2 or not all(map(_is_count, span)):
        raise AdapterError(f"{where}: expected data_offsets [begin, end], but got {shown(span)}")
    return span[0], span[1]


def _entry(name: str, entry: Any, start: int, span: int) -> Entry:
    made = Entry(name, _DTYPES[entry["dtype"]], tuple(entry["shape"]), start)
    if made.nbytes != span:
        raise AdapterError(
            f"{shown(name, 200)}: expected {made.nbytes} bytes for {entry['dtype']} of shape "
            f"{entry['shape']}, but data_offsets span {span}"
        )
    return made
