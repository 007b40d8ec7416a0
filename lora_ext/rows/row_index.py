"""Which adapter each row of a batch has, as an index for the op of one layer.

A block of `lora_ext.use_adapters` has distinct names and an int32 index into them, for samples
``[batch]`` or for tokens ``[batch, tokens]``. A layer needs the index of its own rows: expanded to
the leading dimensions of its x and, if it lacks some of the adapters, renumbered to those that it
has. Each such tensor is made once for a block, and shared by all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..torch_state import is_traced, outside_inference

# No adapter has this number: the op raises an error.
_NO_NAME = 2**31 - 1
# Tensors that a block keeps: more than one forward needs, few beside a generation's lengths.
_KEPT = 32


class RowIndex:
    """The adapters of a batch's rows.

    Attributes:
        names: distinct names of adapters; the index refers to them.
        index: int32 ``[batch]`` or ``[batch, tokens]``, -1 for the base alone.
        slots: the same with slots of a pool instead of names; None if not all names belong to a
            pool.
        repeats: how often the model may repeat each sample, as beam search does.
    """

    def __init__(
        self, names: Sequence[str], index: Tensor, slots: Tensor | None = None, repeats: int = 1
    ) -> None:
        self.names = tuple(names)
        self.index, self.slots = index, slots
        self.repeats = repeats
        # Number of tokens in the last x with 3 dimensions, for layers whose x is flattened.
        self._tokens = 0
        self._made: dict[Any, Tensor] = {}

    def index_of(
        self, lead: torch.Size, device: torch.device, names: Sequence[str] | None
    ) -> Tensor:
        """int32 ``[rows]``: for each row its position in `names`, or its slot of the pool; or -1.

        Args:
            lead: the shape of x without its features.
            device: that of x.
            names: those of this block that the layer has, in the block's order; None for slots.

        Raises:
            ValueError: the rows do not correspond to the block's samples.
        """
        own = self.index if names is not None else self.slots
        assert own is not None
        if is_traced():
            return self._chosen(self._expanded(self.in_graph(own), lead, device), names)
        if len(lead) > 1:
            self._tokens = lead[1]
        which = "slots"
        if names is not None:
            which = None if len(names) == len(self.names) else tuple(names)
        key = (lead, device, which, self._tokens)
        return self._kept(key, lambda: self._chosen(self._expanded(own, lead, device), names))

    def in_graph(self, index: Tensor) -> Tensor:
        """The index or the slots as an operand of a graph that is being traced."""
        return index

    def _kept(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that later forwards take, too; the oldest one goes."""
        found = self._made.get(key)
        if found is None:
            with outside_inference():  # a forward of a training step may be the next
                found = make()
            if len(self._made) >= _KEPT:
                self._made.pop(next(iter(self._made)), None)
            self._made[key] = found
        return found

    def index_for(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """`index_of` for the rows of x ``[..., in]``; an x ``[tokens, in]``, as a mixture's router
        and experts get it, may be a view of a whole one, and holds all tokens of all samples."""
        whole = None if x.dim() != 2 or is_traced() or len(self.index) == 1 else x._base
        if whole is not None and whole.dim() == 3 and whole.numel() == x.numel():
            return self.index_of(whole.shape[:2], x.device, names)
        lead, batch = x.shape[:-1], self.index.shape[0]
        if x.dim() != 2:
            return self.index_of(lead, x.device, names)
        # An index of samples needs no repeats: a repeated sample's tokens are as more tokens of it.
        if self.index.dim() == 1 or self.repeats == 1:
            if batch and lead[0] % batch == 0:
                lead = torch.Size((batch, lead[0] // batch))
            return self.index_of(lead, x.device, names)
        known = 0 if is_traced() else self._tokens
        found = self.index_of(self._of_repeats(lead, known), x.device, names)
        if not is_traced():
            self._tokens = known  # of an x with 3 dimensions: this one may be of another step
        return found

    def _of_repeats(self, lead: torch.Size, known: int) -> torch.Size:
        """The samples, repeated or not, and tokens of x, for an index of tokens.

        Args:
            known: number of tokens in the last x with 3 dimensions, or 0.

        Raises:
            ValueError: rows may be those of a prompt, and as well those of a step after one.
        """
        batch, width = self.index.shape
        counts = [(s, t) for s in (batch, batch * self.repeats) for t in {width, 1}]
        fits = [pair for pair in counts if pair[0] * pair[1] == lead[0]]
        fits = [pair for pair in fits if pair[1] == known] or fits
        if len(fits) > 1:
            raise ValueError(
                f"lora_ext.use_adapters: expected rows of which the samples are known, but "
                f"{lead[0]} may be {width} tokens of {batch} samples, or one of each repeated "
                f"{self.repeats} times; give an index of samples, or repeat it and omit repeats"
            )
        return torch.Size(fits[0]) if fits else lead

    def scaling_of(self, scalings: tuple[Any, ...], device: torch.device) -> Any:
        """float32 ``[adapters]``, made once for the same numbers; the numbers under a compiler."""
        if any(isinstance(scaling, Tensor) for scaling in scalings):
            return torch.stack(
                [torch.as_tensor(s, dtype=torch.float32, device=device).view(()) for s in scalings]
            )
        if is_traced():
            return scalings
        like = {"dtype": torch.float32, "device": device}
        return self._kept((scalings, device), lambda: torch.tensor(scalings, **like))

    def sample_names(self, nobody: str) -> list[str] | None:
        """A name for each sample; None if the tokens of one sample may differ."""
        if self.index.dim() != 1:
            return None
        return [nobody if i < 0 else self.names[i] for i in self.index.tolist()]

    def _chosen(self, index: Tensor, names: Sequence[str] | None) -> Tensor:
        """The index renumbered to refer to `names`."""
        if names is None or len(names) == len(self.names):
            return index
        places = {name: place for place, name in enumerate(names)}
        count = len(self.names)
        table = [_NO_NAME, -1, *(places.get(name, -1) for name in self.names), _NO_NAME]
        numbers = torch.tensor(table, dtype=torch.int32, device=index.device)
        return numbers[(index + 2).clamp(0, count + 2)]

    def _expanded(self, index: Tensor, lead: torch.Size, device: torch.device) -> Tensor:
        """The index with one element for each of the rows ``lead``."""
        index = index.to(device)
        if len(lead) == 1:
            lead = self._unflattened(index, lead)
        if len(lead) == 0:
            raise self._mismatch(lead)
        if lead[0] != index.shape[0]:
            if lead[0] != index.shape[0] * self.repeats:
                raise self._mismatch(lead)
            index = index.repeat_interleave(self.repeats, 0)
        if index.dim() == 2:
            if lead[1] == 1:
                index = index[:, -1:]  # a step after the prompt: the last adapter of each sample
            elif lead[1] != index.shape[1]:
                raise self._mismatch(lead)
        return index.reshape(*index.shape, *(1 for _ in lead[index.dim() :])).expand(lead).flatten()

    def _unflattened(self, index: Tensor, lead: torch.Size) -> torch.Size:
        """The samples, or samples and tokens, of x ``[rows, in]``."""
        batches = {index.shape[0], index.shape[0] * self.repeats}
        tokens = 0 if is_traced() else self._tokens
        if index.dim() == 1 and lead[0] in batches:
            return lead
        if index.dim() == 2:
            tokens = tokens or index.shape[1]
        for batch in batches:
            if tokens and batch * tokens == lead[0]:
                return torch.Size((batch, tokens))
        raise self._mismatch(lead)

    def _mismatch(self, lead: torch.Size) -> ValueError:
        batch, rest = self.index.shape[0], list(self.index.shape[1:])
        samples = lead[0] if len(lead) else 0
        wanted = f"[{batch}, tokens, in]"
        if rest:
            wanted = f"[{batch}, {rest[0]}, in], or [{batch}, 1, in] for a step after it"
        hint = "; samples come first, in the order of the names"
        if batch and samples > batch and samples % batch == 0:
            hint = _hint_of_more(samples, batch, "a row of the index" if rest else "a name", lead)
        elif rest and len(lead) > 1 and samples in (batch, batch * self.repeats):
            hint = "; give an index for these tokens, or one for each sample"
        return ValueError(
            f"lora_ext.use_adapters: expected x of shape {wanted}, for an index of shape "
            f"{list(self.index.shape)}, but a layer got [{', '.join(map(str, lead))}, in]{hint}"
        )


def _hint_of_more(samples: int, batch: int, own: str, lead: torch.Size) -> str:
    """What to do if x has a multiple of the block's samples, or other rows."""
    hint = (
        f"; give {own} for each of the {samples} samples, in their order: a batch of torch.cat("
        '[uncond, cond]), as in classifier-free guidance, wants the names twice, ["a", "b", "a", '
        '"b"]'
    )
    if len(lead) == 1:
        # Rows of a vision tower: their number has no meaning here and differs between layers.
        return (
            f"{hint}. Where the {samples} rows are no samples, such as the patches of all images, "
            "none can have an adapter of its own: target other layers"
        )
    return (
        f"{hint}. Only where each sample is repeated beside itself, as generate does for num_beams "
        f"and num_return_sequences: [a, a, b, b], give use_adapters(..., "
        f"repeats={samples // batch})"
    )
