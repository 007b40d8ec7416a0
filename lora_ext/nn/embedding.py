"""LoRAEmbedding: nn.Embedding with adapters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..call import Call, Decision, Path
from ..call.apply import Update, mixed_lookup
from ..call.decision import by_row, example
from ..rows.row_adapters import RowAdapters
from . import initialize
from .adapter_spec import optional_spec
from .base import LoRALayer


class LoRAEmbedding(LoRALayer, nn.Embedding):
    """A drop-in for nn.Embedding with low-rank adapters on a frozen table.

        y = W[ids] + scaling * lora_a[:, ids]^T lora_b^T

    lora_a is ``[r, num_embeddings]``, initially zero, lora_b ``[embedding_dim, r]``, initially
    normal, as in loralib and PEFT. Dropout has no input to act on, so a spec's dropout is ignored,
    as in PEFT. The update is a lookup and a small product by torch.

    Args:
        num_embeddings, embedding_dim, padding_idx, device, dtype: nn.Embedding's.
        r: rank; 0 adds no adapter.
        lora_alpha, use_rslora, adapter_dtype: as in `LoRALinear`.

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
        lora_alpha: float = 8.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        spec = optional_spec(r, lora_alpha, use_rslora=use_rslora)
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self._init_lora()
        self._add_default(spec, adapter_dtype)

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
            what = f"init {spec.init_lora_weights!r}" if spec.subtracts_init else "lora_bias"
            raise ValueError(f"lora_ext.nn.LoRAEmbedding: {what} is for linear layers only")
        initialize.embedding_(self.lora_a[name], self.lora_b[name])

    def forward(self, input: Tensor) -> Tensor:
        return self.decide(Call(input, self.adapters_of_rows())).run(input)

    def example(self, rows: int | None, block: RowAdapters | None) -> Tensor:
        return example(self, torch.int64, rows, block)

    def base_forward(self, x: Tensor) -> Tensor:
        return self._look_up(x, self.base_operands()[0])

    def _decide_for(self, names: Sequence[str], call: Call) -> Decision:
        what = by_row(call, names, "an embedding's update is a lookup and a small product by torch")
        return Decision(partial(self._added, names, call.rows), Path.ADDED, what)

    def _added(self, names: Sequence[str], rows: RowAdapters | None, ids: Tensor) -> Tensor:
        # A sparse gradient cannot pass through the transposition.
        look_up = partial(self._look_up, ids, sparse=False)
        return mixed_lookup(self.base_forward(ids), ids, self._updates_of(names), rows, look_up)

    def _updates_of(self, names: Sequence[str]) -> list[Update]:
        found = []
        for name in names:
            lora_a, lora_b = self.factors(name)
            if lora_a.shape[1] != self.weight.shape[0]:
                raise RuntimeError(
                    f"lora_ext.nn.LoRAEmbedding: expected a table of {lora_a.shape[1]} rows, for "
                    f"which adapter {name!r} was made, but it has {self.weight.shape[0]}; resize "
                    "it (resize_token_embeddings) before apply_lora, or delete the adapter and add "
                    "it again"
                )
            found.append(Update(name, lora_a, lora_b, None, self.adapters[name].scaling, 0.0))
        return found

    def _look_up(self, ids: Tensor, table: Tensor, sparse: bool | None = None) -> Tensor:
        return F.embedding(
            ids,
            table,
            self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse if sparse is None else sparse,
        )
