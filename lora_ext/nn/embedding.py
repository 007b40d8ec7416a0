"""LoRAEmbedding: nn.Embedding with adapters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..call import Decision
from ..call.apply import mixed_lookup
from ..call.decision import of_rows
from ..call.updates import Update
from ..invariance import refuse
from . import initialize
from .adapter_spec import DEFAULT_ADAPTER, AdapterSpec
from .base import LoRALayer
from .row_adapters import RowAdapters


class LoRAEmbedding(LoRALayer, nn.Embedding):
    """A drop-in for nn.Embedding with low-rank adapters on a frozen table.

        y = W[ids] + scaling * lora_a[:, ids]^T lora_b^T

    lora_a is ``[r, num_embeddings]``, initially zero, lora_b ``[embedding_dim, r]``, initially
    normal, as in loralib and PEFT. Dropout has no input to act on, so a spec's dropout is ignored,
    as in PEFT. The update is a lookup and a small product by torch.

    Args:
        num_embeddings, embedding_dim, padding_idx, device, dtype: nn.Embedding's.
        r: rank; 0 adds no adapter.
        alpha, use_rslora, adapter_dtype: as in `LoRALinear`.

    Raises:
        ValueError: a number is out of its range.
    """

    bias = None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        r: int = 8,
        alpha: float = 8.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        spec = AdapterSpec(r, alpha, use_rslora=use_rslora) if r != 0 else None
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self._init_lora()
        if spec is not None:
            self.add_adapter(DEFAULT_ADAPTER, spec, adapter_dtype)

    @classmethod
    def _check_base(cls, base: nn.Module) -> None:
        super()._check_base(base)
        if base.max_norm is not None:
            raise ValueError(
                "lora_ext.nn.LoRAEmbedding: expected an embedding without max_norm, but got "
                f"max_norm={base.max_norm}, which writes to the weight that LoRA freezes"
            )

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.t()

    def initialize(self, name: str) -> None:
        spec = self.adapters[name]
        if spec.subtracts_init or spec.lora_bias:
            what = f"init {spec.init!r}" if spec.subtracts_init else "lora_bias"
            raise ValueError(f"lora_ext.nn.LoRAEmbedding: {what} is for linear layers only")
        initialize.embedding_(self.lora_a[name], self.lora_b[name])

    def forward(self, input: Tensor) -> Tensor:
        return self.decide(input, self.adapters_of_rows()).run(input)

    def base_forward(self, x: Tensor) -> Tensor:
        return self._look_up(x, self.base_operands()[0])

    def _adapted(self, x: Any) -> Decision:
        reason = "an embedding's update is a lookup and a small product by torch"
        return Decision(self._added, "library", reason)

    def _of_names(self, x: Any, names: Sequence[str], rows: RowAdapters) -> Decision:
        return Decision(partial(self._mixed, names, rows), "library", of_rows(names))

    def _added(self, ids: Tensor) -> Tensor:
        y = self.base_forward(ids)
        refuse("an embedding")
        for update in self._updates_of(self.added_adapters):
            # A sparse gradient cannot pass through the transposition.
            column = self._look_up(ids, update.lora_a.t(), sparse=False)
            y = y + (column @ update.lora_b.t()) * update.scaling
        return y.to(self.weight.dtype)

    def _updates_of(self, names: Sequence[str]) -> list[Update]:
        each = ((name, *self._checked_factors(name)) for name in names)
        return [Update(n, a, b, None, self.adapters[n].scaling, 0.0) for n, a, b in each]

    def _checked_factors(self, name: str) -> tuple[Tensor, Tensor]:
        lora_a, lora_b = self.factors(name)
        if lora_a.shape[1] != self.weight.shape[0]:
            raise RuntimeError(
                f"lora_ext.nn.LoRAEmbedding: expected a table of {lora_a.shape[1]} rows, for "
                f"which adapter {name!r} was made, but it has {self.weight.shape[0]}; resize "
                "it (resize_token_embeddings) before apply_lora, or delete the adapter and add "
                "it again"
            )
        return lora_a, lora_b

    def _mixed(self, names: Sequence[str], rows: RowAdapters, ids: Tensor) -> Tensor:
        """The layer on ids, each row with the adapter that the block selects for it."""

        def look_up(table: Tensor) -> Tensor:
            return self._look_up(ids, table, sparse=False)

        return mixed_lookup(self.base_forward(ids), ids, self._updates_of(names), rows, look_up)

    def _look_up(self, ids: Tensor, table: Tensor, sparse: bool | None = None) -> Tensor:
        return F.embedding(
            ids,
            table,
            self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse if sparse is None else sparse,
        )
