"""safetensors files, read and written by the safetensors library.

A file is opened through a descriptor, so the file that is read is the one that was found to be a
regular file of the folder. The library checks the header against the file; names, shapes and dtypes
are known before a tensor is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import AdapterError, shown


class Entry(NamedTuple):
    """One tensor of the file: its key, its dtype as safetensors names it ("BF16"), its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def check(
        self, *shapes: tuple[int, ...], why: str = "", advice: str = "", is_floating: bool = True
    ) -> None:
        """Raises AdapterError, with the shapes' reason, for one of another shape or dtype."""
        where = shown(self.name, 200)
        if is_floating and not self.dtype.startswith(("F", "BF")):
            raise AdapterError(f"{where}: expected a floating dtype, but got {self.dtype}")
        if self.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise AdapterError(
                f"{where}: expected shape {wanted}{why}, but got {list(self.shape)}{advice}"
            )


class TensorFile:
    """An open safetensors file; its entries, by key."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.entries = {key: self._entry(key) for key in file.keys()}  # noqa: SIM118

    def _entry(self, key: str) -> Entry:
        part = self._file.get_slice(key)
        return Entry(key, part.get_dtype(), tuple(part.get_shape()))

    def read(self, entry: Entry, dtype: torch.dtype | None = None) -> Tensor:
        """A copy of the tensor, on the CPU, in `dtype`, or the file's; AdapterError if torch does
        not have it, or a value is not finite in it."""
        where = shown(entry.name, 200)
        try:
            stored = self._file.get_tensor(entry.name)
        except Exception as error:  # SafetensorError has no standard base class but Exception
            with suppress(Exception):
                self._file.get_tensor(entry.name)
                # A ValueError of torch's replaces what a signal raises in UntypedStorage's methods.
                raise KeyboardInterrupt from None
            raise AdapterError(f"{where}: expected a tensor for torch, but got {error}") from None
        value = stored.to(dtype or stored.dtype, copy=True)
        comparable = value.float() if value.itemsize == 1 else value  # no isfinite for float8
        if value.is_floating_point() and not torch.isfinite(comparable).all():
            raise AdapterError(
                f"{where}: expected finite values in {value.dtype}, but got NaN or infinity"
            )
        return value


@contextmanager
def open_tensors(descriptor: int) -> Iterator[TensorFile]:
    """Opens the safetensors file of a descriptor; AdapterError if it is none, or its header
    contradicts itself or its length."""
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(f"/proc/self/fd/{descriptor}", framework="pt")
    except SafetensorError as error:
        raise AdapterError(f"expected a whole safetensors file, but got: {error}") from None
    with opened as file:
        yield TensorFile(file)


def encode(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file with PEFT's metadata, of contiguous tensors on the CPU; those that share
    memory are stored for each name. AdapterError if it cannot store a dtype."""
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
