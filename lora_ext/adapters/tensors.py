"""safetensors files, read and written by the safetensors library.

A file is opened through a descriptor, so the file that is read is the one that was found to be a
regular file of the folder. The library checks the header against the file; names, shapes and dtypes
are known before a tensor is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import AdapterError, shown


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: its key, its dtype as safetensors names it ("BF16"), its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_floating(self) -> bool:
        return self.dtype.startswith(("F", "BF"))


class TensorFile:
    """An open safetensors file.

    Attributes:
        entries: what it holds, by key.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self.entries = {key: self._entry(key) for key in file.keys()}  # noqa: SIM118

    def _entry(self, key: str) -> Entry:
        part = self._file.get_slice(key)
        return Entry(key, part.get_dtype(), tuple(part.get_shape()))

    def read(self, entry: Entry, dtype: torch.dtype | None = None) -> Tensor:
        """A copy of the tensor, on the CPU.

        Args:
            entry: of this file.
            dtype: of the copy; None keeps the file's.

        Raises:
            AdapterError: torch does not have the dtype, or a value is not finite in `dtype`.
        """
        where = shown(entry.name, 200)
        try:
            stored = self._file.get_tensor(entry.name)
        except Exception as error:  # SafetensorError has no standard base class but Exception
            raise AdapterError(f"{where}: expected a tensor for torch, but got {error}") from None
        value = stored.to(dtype or stored.dtype, copy=True)
        if value.is_floating_point() and not torch.isfinite(_comparable(value)).all():
            raise AdapterError(
                f"{where}: expected finite values in {value.dtype}, but got NaN or infinity"
            )
        return value


@contextmanager
def open_tensors(descriptor: int) -> Iterator[TensorFile]:
    """Opens a safetensors file.

    Args:
        descriptor: of the file, open for reading.

    Raises:
        AdapterError: it is not a safetensors file, or its header contradicts itself or its length.
    """
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(f"/proc/self/fd/{descriptor}", framework="pt")
    except SafetensorError as error:
        raise AdapterError(f"expected a whole safetensors file, but got: {error}") from None
    with opened as file:
        yield TensorFile(file)


def encode(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file with the metadata that PEFT writes; tensors that share memory are
    stored for each name.

    Args:
        tensors: by name; contiguous, on the CPU.

    Raises:
        AdapterError: safetensors cannot store a dtype.
    """
    from safetensors.torch import save

    seen: set[int] = set()
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    try:
        return save(own, metadata={"format": "pt"})
    except (KeyError, ValueError) as error:
        raise AdapterError(f"expected tensors that safetensors stores, but got {error}") from None


def _comparable(value: Tensor) -> Tensor:
    return value.float() if value.itemsize == 1 else value  # no isfinite for float8
