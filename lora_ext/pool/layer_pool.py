"""One layer's part of an `lora_ext.AdapterPool`: a slot for each adapter, in tensors whose
addresses do not change."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..call.apply import Slots
from ..dtypes import HALVES
from ..nn.adapter_spec import MAX_RANK, AdapterSpec
from ..torch_state import compute_dtype


class SlotContent(NamedTuple):
    """The content of a slot, to be restored."""

    spec: AdapterSpec | None
    parameters: tuple[nn.Parameter, nn.Parameter] | None
    values: tuple[Tensor, Tensor] | None


class LayerPool(nn.Module):
    """Slots for adapters of a linear layer.

        slot s:  lora_a[s, :ranks[s]], lora_b[s, :, :ranks[s]], scaling[s]

    Adding, replacing and removing adapters writes into these tensors, which keep their addresses,
    so a captured graph continues to read them. The buffers, and the parameters that share their
    memory, follow the model to another device or dtype; neither is part of a state dict. Each
    parameter has its own version counter: a step of one adapter does not count as a change of
    another adapter that is between its forward and backward.

    Attributes:
        lora_a: ``[capacity, max_rank, in]``.
        lora_b: ``[capacity, out, max_rank]``; on the CPU its memory is ``[capacity, max_rank,
            out]``, so that a slot's first ranks are dense, as torch's fused optimizers require.
        ranks: int32 ``[capacity]``, 0 for a slot that is free or whose adapter is not in this
            layer.
        scaling: float32 ``[capacity]``.
        names: name -> slot, one dictionary that all layers of a pool share.
        specs: name -> `AdapterSpec` in this layer, for the adapters that it has.
        slots: name -> (lora_a ``[r, in]``, lora_b ``[out, r]``), leaf parameters whose memory is
            the slot's.
        matrix_shape: (out, in).
        max_rank: of the pool.
    """

    lora_a: Tensor
    lora_b: Tensor
    ranks: Tensor
    scaling: Tensor

    def __init__(
        self,
        shape: tuple[int, int],
        capacity: int,
        max_rank: int,
        names: dict[str, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.matrix_shape, self.max_rank = shape, max_rank
        like = {"dtype": dtype, "device": device}
        shape_a, shape_b = self.shapes(self.largest_rank)
        with torch.inference_mode(False):
            tensors = {
                "lora_a": torch.zeros(capacity, *shape_a, **like),
                "lora_b": self._laid_out(torch.zeros(capacity, *shape_b, **like)),
                "ranks": torch.zeros(capacity, dtype=torch.int32, device=device),
                "scaling": torch.zeros(capacity, dtype=torch.float32, device=device),
            }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)
        self.names = names
        self.specs: dict[str, AdapterSpec] = {}
        self.slots: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        # The buffer for the copies of `held`: allocating it each time takes longer than the copy.
        self._spare: tuple[Tensor, Tensor] | None = None

    def __contains__(self, name: object) -> bool:
        return name in self.specs and name in self.names

    # The layout of a slot, which a subclass may have in another way.

    @property
    def largest_rank(self) -> int:
        """The rank of an adapter that fills its slot."""
        return self.max_rank

    def shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of an adapter's lora_a and lora_b."""
        out_features, in_features = self.matrix_shape
        return (rank, in_features), (out_features, rank)

    def _parts(self, lora_a: Tensor, lora_b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The memory of an adapter of this rank in the tensors of a slot."""
        return lora_a[:rank], lora_b[:, :rank]

    def _laid_out(self, lora_b: Tensor) -> Tensor:
        """``[capacity, out, max_rank]`` with dense slots; on CUDA contiguous, for the kernels."""
        return lora_b.contiguous() if lora_b.is_cuda else lora_b.mT.contiguous().mT

    # Used by a forward.

    def needs_lists(self, layer: nn.Module, x: Tensor) -> bool:
        """Whether a forward uses the parameters of the adapters in the batch instead of the whole
        pool, because of gradients, dropout or another dtype."""
        dtype = self.lora_a.dtype
        if torch.is_grad_enabled() or layer.training or dtype is torch.float64:
            return True
        return dtype in HALVES and dtype is not compute_dtype(x)

    @property
    def updates(self) -> Slots:
        """Those of all slots, for `apply`."""
        return Slots(self.lora_a, self.lora_b, self.scaling, self.ranks)

    # Used by a pool.

    def held(self, name: str) -> SlotContent:
        """A copy of an adapter's content, for `put_back`; valid until the next call."""
        found = self.slots.get(name) if name in self else None
        if found is None:
            return SlotContent(None, None, None)
        first, second = (parameter.detach() for parameter in found)
        if self._spare is None:
            with torch.inference_mode(False):
                self._spare = torch.empty_like(self.lora_a[0]), torch.empty_like(self.lora_b[0])
        lora_a, lora_b = self._parts(*self._spare, self.specs[name].r)
        kept = lora_a.copy_(first), lora_b.copy_(second)
        return SlotContent(self.specs[name], found, kept)

    def write(
        self, name: str, slot: int, spec: AdapterSpec | None, values: Any, trainable: bool
    ) -> None:
        """Writes (lora_a, lora_b) into a slot; parameters with the same rank are kept.

        Args:
            spec, values: None if the adapter is not in this layer.
        """
        parameters = None
        if spec is not None:
            is_kept = name in self and self.specs[name].r == spec.r
            parameters = self.slots[name] if is_kept else self._views(slot, spec.r, trainable)
        self.put_back(name, slot, SlotContent(spec, parameters, values))

    def put_back(self, name: str, slot: int, content: SlotContent) -> None:
        """Puts an adapter's content, as of `held`, into its slot; an empty one frees the slot."""
        spec, parameters, values = content
        if spec is None or parameters is None or values is None:
            self.specs.pop(name, None)
            self.slots.pop(name, None)
            self.ranks[slot] = 0
            return
        self.slots[name] = parameters
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
            self.scaling[slot] = spec.scaling
            self.ranks[slot] = spec.r
        self.specs[name] = spec

    def _views(self, slot: int, rank: int, trainable: bool) -> tuple[nn.Parameter, nn.Parameter]:
        with torch.inference_mode(False):
            lora_a, lora_b = self._parts(self.lora_a[slot], self.lora_b[slot], rank)
            first, second = _counted_apart(lora_a), _counted_apart(lora_b)
            return nn.Parameter(first, trainable), nn.Parameter(second, trainable)

    # Copies and moves.

    def _apply(self, fn: Any, recurse: bool = True) -> LayerPool:
        super()._apply(fn, recurse)
        self.lora_b = self._laid_out(self.lora_b)
        self._spare = None
        numbers = [0.0] * len(self.ranks)
        for name, spec in self.specs.items():
            if name in self.names:
                numbers[self.names[name]] = spec.scaling
        # float32 for any dtype of the model
        self.scaling = torch.tensor(numbers, dtype=torch.float32, device=self.ranks.device)
        for name, found in list(self.slots.items()):
            if name not in self.names:
                continue
            views = self._views(self.names[name], self.specs[name].r, found[0].requires_grad)
            if self.lora_a.is_meta != found[0].is_meta:
                self.slots[name] = views  # new parameters, as in nn.Module, e.g. on meta
                continue
            for parameter, view in zip(found, views, strict=True):
                parameter.data = view.data
                if parameter.grad is not None:
                    grad = fn(parameter.grad)
                    parameter.grad = None
                    parameter.grad = grad
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state["_spare"] = None
        state["slots"] = {n: [p.requires_grad for p in found] for n, found in self.slots.items()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        trainable, self.slots = self.slots, {}
        for name, flags in trainable.items():
            if name in self.names and name in self.specs:
                views = self._views(self.names[name], self.specs[name].r, False)
                for parameter, flag in zip(views, flags, strict=True):
                    parameter.requires_grad_(bool(flag))
                self.slots[name] = views


class ParameterPool(LayerPool):
    """Slots for adapters of a `LoRAParameter`: of a matrix, or a stack of E.

    An adapter of rank r has the first numbers of its slot's memory, without gaps, in the layout in
    which a `LoRAParameter` keeps factors. So nothing is padded for a rank below that of the slot,
    and a forward reads a slot as it reads the factors of any other adapter.

        lora_a [E r, in]     the first E r rows of lora_a[s]
        lora_b [out, r E]    the first out r E numbers of lora_b[s]

    Attributes:
        lora_a: ``[capacity, E R, in]`` for a largest rank R.
        lora_b: ``[capacity, out, R E]``, contiguous on every device.
        count: E, 1 for a matrix.
        projections: how many projections each matrix holds, as LoraConfig counts them: R is so many
            times the pool's max_rank, at most 512.
    """

    def __init__(self, *operands: Any, count: int, projections: int = 1) -> None:
        self.count, self.projections = count, projections  # first: the base's __init__ reads them
        super().__init__(*operands)

    @property
    def largest_rank(self) -> int:
        return min(self.projections * self.max_rank, MAX_RANK)

    def shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return super().shapes(rank * self.count)

    def _parts(self, lora_a: Tensor, lora_b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        (width, _), shape_b = self.shapes(rank)
        return lora_a[:width], lora_b.view(-1)[: math.prod(shape_b)].view(shape_b)

    def _laid_out(self, lora_b: Tensor) -> Tensor:
        return lora_b.contiguous()


def _counted_apart(view: Tensor) -> Tensor:
    """A tensor on the same memory with a separate version counter."""
    place = view.storage_offset(), view.shape, view.stride()
    return view.new_empty(0).set_(view.untyped_storage(), *place)


def detach_from_pool(parameters: tuple[nn.Parameter, nn.Parameter] | None) -> None:
    """Detaches parameters, which an optimizer may still hold, from the slot's memory."""
    for parameter in parameters or ():
        parameter.grad = None
        parameter.data = parameter.data.new_empty(0)
        parameter.detach().zero_()  # raises the version: a backward that needs it must fail
