"""A frozen weight in oneDNN's packed layout, for the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple
from weakref import WeakSet, ref

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .measure import Measured, near

# Number of rows for which oneDNN chooses the layout; its blocked layouts suit all batch sizes.
_LAYOUT_ROWS = 512
# A single float32 row is a GEMV, where MKL was 1.3 to 1.6 times faster than oneDNN's blocks.
_MIN_PACKED_ROWS = {torch.float32: 2, torch.bfloat16: 1}
_PACKABLE = (torch.float32, torch.bfloat16)
_CHANGED = "the weight was changed, replaced, moved or cast since it was packed"


# A pack is used if its product takes at most this fraction of the plain product's time.
MOST_TIME = 0.95


class Wins(NamedTuple):
    """Measured time of the packed product over that of the plain one: (rows of x, ratio) in each
    direction.

    A call uses the measurement whose number of rows is nearest to its own, as a ratio, and takes
    the pack if it is faster by at least 5 %.
    """

    forward: Measured = ()
    backward: Measured = ()


class PackedWeight:
    """A frozen weight with a packed copy; `lora_linear` accepts it instead of the weight.

    The pack is a cache: copies, pickles and state dicts contain the weight alone. Each use compares
    the weight's storage, dtype, shape, strides and version with those at packing, and drops the
    pack if they differ: after ``Module.to``, ``weight.data = other``, ``weight.add_(...)``.
    Writing values through ``weight.data`` changes none of these, so it cannot be detected cheaply:
    call `drop` after such a write, or `verify` to compare a checksum.

    Attributes:
        weight: the original tensor, never a copy; None once a layer that had it has another, and
            nobody else does.
        transposed: the weight is stored as ``[in_features, out_features]``, as in Conv1D.
        wins: where the pack is faster, if this was measured (`lora_ext.warmup`); otherwise the pack
            is used in all cases except a single row in float32.
        reason: why there is no pack, or an empty string.
        debug: set ``PackedWeight.debug = True`` to call `verify` in every `lora_linear` call.
    """

    debug: ClassVar[bool] = False

    def __init__(
        self,
        weight: Tensor,
        packed: Tensor | None,
        packed_t: Tensor | None,
        reason: str,
        transposed: bool = False,
        wins: Wins | None = None,
    ) -> None:
        self._weight: Any = weight
        self.reason, self.transposed, self.wins = reason, transposed, wins
        self._packed, self._packed_t = packed, packed_t
        self._identity = _identity(weight) if self.is_packed else None
        self._storage = StorageWeakRef(weight.untyped_storage()) if self.is_packed else None
        self._checksum = _checksum(weight) if self.is_packed else None
        if self.is_packed:
            _packs.add(self)

    @property
    def weight(self) -> Any:
        held = self._weight
        return held() if type(held) is ref else held

    def of_layer(self) -> PackedWeight:
        """This pack, which no longer keeps the weight, as its layer does that."""
        self._weight = ref(self.weight)
        return self

    @property
    def matrix(self) -> Tensor:
        """The weight as ``[out_features, in_features]``."""
        return self.weight.t() if self.transposed else self.weight

    @property
    def is_packed(self) -> bool:
        return self._packed is not None or self._packed_t is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the packed copies, 0 when not packed (oneDNN may pad a few more)."""
        return sum(each.numel() * each.dtype.itemsize for each in self.copies if each is not None)

    @property
    def copies(self) -> tuple[Tensor | None, Tensor | None]:
        """(operand of the forward product, operand of the backward product) in oneDNN's layout."""
        return self._packed, self._packed_t

    def drop(self, reason: str = "dropped") -> None:
        """Frees the packed copies; later calls use the plain weight."""
        self._packed = self._packed_t = self._checksum = None
        self.reason = reason

    def drop_if_written(self) -> None:
        """Drops the pack if `verify` would raise."""
        if self._is_written():
            self.drop(_CHANGED)

    def verify(self) -> None:
        """Compares a sampled checksum of the weight with that of the pack.

        Raises:
            RuntimeError: the weight was written to since it was packed.
        """
        if self._is_written():
            raise RuntimeError(
                "lora_ext.functional.PackedWeight: expected the weight as it was packed, but it "
                "was written to since; call pack_weight again after a merge, unmerge or any write "
                "to weight.data"
            )

    def route(self, rows: int) -> tuple[str, str]:
        """("packed" or "unpacked", reason) for a forward with `rows` rows."""
        if not self.is_packed:
            return "unpacked", self.reason
        if self._is_changed():
            return "unpacked", _CHANGED
        if self._packed is None:
            return "unpacked", "packed for backward alone, where it was faster"
        size = f"oneDNN packed weight, {self.nbytes / 2**20:.3g} MiB"
        if self.wins is None:
            if rows < _MIN_PACKED_ROWS[self.weight.dtype]:
                return "unpacked", f"fewer than {_MIN_PACKED_ROWS[self.weight.dtype]} rows"
            return "packed", size
        ratio = near(rows, self.wins.forward)
        if ratio > MOST_TIME:
            return "unpacked", f"packed, {ratio:.2f} of the time without at so many rows"
        return "packed", f"{size}, {ratio:.2f} of the time without as measured"

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(weight, packed, packed transposed) for a call on x; None if the plain weight is used."""
        if not self.is_packed or torch.compiler.is_compiling():
            return self.matrix, None, None
        if self._is_changed():
            self.drop(_CHANGED)
            return self.matrix, None, None
        if PackedWeight.debug:
            self.verify()
        rows = x.numel() // max(1, x.shape[-1]) if x.dim() else 0
        if self.wins is None:
            forward = backward = rows >= _MIN_PACKED_ROWS[self.weight.dtype]
        else:
            forward, backward = (near(rows, each) <= MOST_TIME for each in self.wins)
        packed = self._packed if forward else None
        return self.matrix, packed, self._packed_t if backward else None

    def _is_written(self) -> bool:
        known, weight = self._checksum, self.weight
        return known is not None and weight is not None and known != _checksum(weight)

    def _is_changed(self) -> bool:
        """Whether the weight differs from the one that was packed. A weight that was cast and cast
        back often has its old address, so the packed weight is identified by its live storage.
        """
        assert self._storage is not None
        return self._storage.expired() or _identity(self.weight) != self._identity

    def to(self, *args, **kwargs) -> PackedWeight:
        """The weight moved or cast by ``Tensor.to``, without the pack."""
        moved = self.weight.to(*args, **kwargs)
        if moved is self.weight:
            return self
        return PackedWeight(moved, None, None, "moved by .to()", self.transposed)

    def __reduce__(self) -> tuple:
        reason = "copied or unpickled: call pack_weight again"
        return PackedWeight, (self.weight, None, None, reason, self.transposed)

    def __repr__(self) -> str:
        if self.weight is None:
            return "PackedWeight(of a weight that is gone)"
        state = f"packed, {self.nbytes} bytes" if self.is_packed else f"unpacked: {self.reason}"
        return f"PackedWeight({list(self.matrix.shape)}, {self.weight.dtype}, {state})"


# Those that are packed: layers over one weight may each have their own.
_packs: WeakSet[PackedWeight] = WeakSet()


def writes_weight(method: Callable[..., None], always: bool = True) -> Any:
    """The method of a PEFT layer, which writes to the data of its base's parameters, and so changes
    no version: drops the packs of these, whichever layers have them; not always: only if the values
    were changed."""

    @functools.wraps(method)  # callers inspect merge's signature
    def writing(layer: Any, *args: Any, **kwargs: Any) -> None:
        try:
            method(layer, *args, **kwargs)
        finally:
            parameters = layer.get_base_layer().parameters(recurse=False) if _packs else ()
            storages = {StorageWeakRef(each.untyped_storage()) for each in parameters}
            for pack in [pack for pack in _packs if pack._storage in storages]:
                if always:
                    pack.drop(_CHANGED)
                else:
                    pack.drop_if_written()

    return writing


class Base(NamedTuple):
    """A layer's frozen weight in the form that `pack_weight` takes, and its bias."""

    weight: Tensor
    bias: Tensor | None
    transposed: bool


class Packable:
    """A layer that uses a pack of its weight if it has one.

    Attributes:
        packed: the pack of the layer's weight; a pack of another weight is not used.
    """

    packed: PackedWeight | None = None

    def packable(self) -> Base | None:
        """The weight that can be packed; None if a pack would not be used."""
        raise NotImplementedError

    def pack_of(self, weight: Tensor) -> PackedWeight | None:
        """The pack if it is of this weight. Otherwise it is freed when its own weight is gone, as
        in FSDP, and kept where a call alone has another, as in torch.func.functional_call."""
        packed = self.packed
        if packed is None:
            return None
        own = packed.weight
        if own is None:
            self.packed = None
        return packed if own is weight and packed.is_packed else None


def pack_weight(
    weight: Tensor, *, forward: bool = True, backward: bool = False, transposed: bool = False
) -> PackedWeight:
    """Packs a frozen CPU weight in oneDNN's layout once, for all later calls of `lora_linear`.

    Args:
        weight: ``[out_features, in_features]``, or the transpose if `transposed`; float32 and
            bfloat16 on the CPU are packed, anything else is returned unpacked with the reason; so
            is a weight made under ``torch.inference_mode``, whose changes could not be detected.
        forward: pack the operand of the forward product.
        backward: pack the transpose, for dX in training: a second copy.
        transposed: the weight is stored as ``[in_features, out_features]``, as in transformers'
            Conv1D.

    Returns:
        A `PackedWeight`; ``is_packed``, ``reason`` and ``nbytes`` describe the result.

    Raises:
        RuntimeError: weight is not 2-D, or requires grad (only a frozen weight stays valid).
    """
    if weight.dim() != 2:
        raise RuntimeError(
            "lora_ext.pack_weight: expected a weight of two dimensions, [out_features, "
            f"in_features], but got {list(weight.shape)}"
        )
    if weight.requires_grad:
        raise RuntimeError(
            "lora_ext.pack_weight: expected a frozen weight, but got one that requires grad; "
            "call weight.requires_grad_(False)"
        )
    reason = unpackable_reason(weight)
    if not (forward or backward):
        reason = "neither forward nor backward was asked for"
    if reason:
        return PackedWeight(weight, None, None, reason, transposed)
    plain = weight.detach()
    matrix, other = (plain.t(), plain) if transposed else (plain, plain.t())
    packed = _reorder(matrix) if forward else None
    packed_t = _reorder(other) if backward else None
    return PackedWeight(weight, packed, packed_t, "", transposed)


def _reorder(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _LAYOUT_ROWS)


def unpackable_reason(weight: Tensor) -> str:
    """Why oneDNN cannot pack a frozen weight, or ""."""
    if weight.device.type != "cpu":
        return f"on {weight.device}: packing is for the CPU"
    if weight.dtype not in _PACKABLE:
        return f"{weight.dtype}: oneDNN packs float32 and bfloat16"
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN"
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this processor has no bfloat16 in oneDNN (AVX-512 is needed)"
    if weight.numel() == 0:
        return "empty"
    if weight.is_inference():
        return (
            "a tensor of torch.inference_mode, whose changes go unnoticed: make the weight outside"
        )
    return ""


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias by one of `PackedWeight.copies`."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _identity(weight: Tensor) -> tuple[Any, ...]:
    """Values that change with the weight, except if values are written through ``weight.data``."""
    if weight.is_inference():  # the data was replaced by an inference tensor
        return ()
    return (
        weight.data_ptr(),
        weight.dtype,
        weight.shape,
        weight.stride(),
        weight.device,
        weight._version,
    )


def _checksum(weight: Tensor) -> int:
    """A weighted sum of the bits of at most about 4096 elements spread over the weight."""
    flat = weight.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // 4096)].contiguous()
    bits = sample.view(torch.int16 if sample.element_size() == 2 else torch.int32).to(torch.int64)
    return int((bits * torch.arange(1, bits.numel() + 1)).sum())
