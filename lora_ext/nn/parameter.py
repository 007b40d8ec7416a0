"""LoRAParameter: adapters on one parameter of a module that is not itself a matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..call import Call, Decision
from ..experts.factors import a_by_expert, b_by_expert
from ..quantized.stack import QuantizedStack
from ..quantized.stacks import stack_of, stored_parameter, whole_parameter
from ..rows.row_adapters import RowAdapters
from .adapter_spec import AdapterSpec
from .base import LoRALayer


class LoRAParameter(LoRALayer):
    """Low-rank adapters on a frozen parameter of another module: a matrix, or a stack of E.

        W_e + scaling * B_e A_e        e < E

    The factors are stored as in PEFT, with e as the slowest index in A and the fastest in B:

        lora_a  [E r, in]    A_e = lora_a.view(E, r, in)[e]
        lora_b  [out, r E]   B_e = lora_b.view(out, r, E)[:, :, e]

    It is a part of a `LoRAModule`, which computes with it; it is never called itself. The parameter
    belongs to the module and is not registered in this layer. A stack may be quantised: `weight` is
    then its codes, and merging into it raises RuntimeError.

    Args:
        module: holds the parameter; not a child of this layer.
        parameter: its name there, of 2 or 3 dimensions.
        transposed: whether it is ``[E, in, out]`` instead of ``[E, out, in]``.
    """

    module: Any
    bias = None

    def __init__(self, module: nn.Module, parameter: str, transposed: bool = False) -> None:
        super().__init__()
        self._init_lora()
        self.__dict__["module"] = module  # not registered: it holds this layer
        self.parameter = parameter
        self.transposed = transposed

    @classmethod
    def _own_base(cls) -> type[nn.Module]:
        return nn.Module

    @property
    def weight(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return stored_parameter(self.module, self.parameter)

    @property
    def stack(self) -> QuantizedStack | None:
        """The weight if it is quantised."""
        found = stack_of(self.module, self.parameter)
        return found if isinstance(found, QuantizedStack) else None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the parameter, also of a quantised one."""
        stack = self.stack
        return tuple(self.weight.shape) if stack is None else stack.shape

    @property
    def count(self) -> int:
        """E, 1 for a matrix."""
        shape = self.weight_shape
        return shape[0] if len(shape) == 3 else 1

    def name_at(self, path: str) -> str:
        """The parameter's name in the model, for this layer's path there."""
        return path.removesuffix(f"lora.{self.parameter}") + self.parameter

    def matrix(self, weight: Tensor) -> Tensor:
        """The ``[out, in]`` or ``[E, out, in]`` view."""
        return weight.transpose(-2, -1) if self.transposed else weight

    @property
    def matrix_shape(self) -> tuple[int, int]:
        rows, columns = self.weight_shape[-2:]
        return (columns, rows) if self.transposed else (rows, columns)

    def factor_shapes(self, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
        out_features, in_features = self.matrix_shape
        return (self.count * r, in_features), (out_features, r * self.count)

    def has(self, name: str | None) -> bool:
        """Whether a forward may add an adapter here: it is on this parameter, and not disabled."""
        return name is not None and self.spec_of(name) is not None and self.adapters_enabled

    def rank(self, name: str) -> int:
        """The rank of each matrix's update."""
        return self.factors(name)[0].shape[0] // self.count

    def _check_new(self, name: str, spec: AdapterSpec) -> None:
        self.check_spec(f"lora_ext.nn.LoRAParameter.add_adapter: {self.parameter!r}", spec)
        super()._check_new(name, spec)

    def check_spec(self, where: str, spec: AdapterSpec) -> None:
        """Raises ValueError for an adapter that a parameter cannot have.

        Args:
            where: the beginning of the message.
        """
        if spec.lora_dropout and not self.module.has_dropout:
            raise ValueError(
                f"{where}: expected dropout 0 for an adapter on a parameter of a "
                f"{self.module.base_type.__name__}, which computes with W + B A, but got "
                f"{spec.lora_dropout}; set lora_dropout=0, or leave the module out (of a router: "
                "without its name in target_modules) and keep it for the other layers"
            )
        if spec.lora_bias:
            raise ValueError(f"{where}: expected no lora_bias, which PEFT has for modules alone")
        if spec.subtracts_init:
            raise ValueError(
                f"{where}: expected init_lora_weights True or 'gaussian', but got "
                f"{spec.init_lora_weights!r}, which is for linear layers"
            )

    def _check_weight(self, where: str) -> None:
        if self.stack is None:
            super()._check_weight(where)
        if len(self.weight_shape) not in (2, 3):
            raise ValueError(
                f"{where}: expected {self.parameter!r} to be a matrix or a stack of matrices, but "
                f"got shape {list(self.weight_shape)}"
            )

    @property
    def changes_weight(self) -> bool:
        """Whether a forward now has another weight than the module's own."""
        if self._disabled or self.adapters_of_rows() is not None:
            return False
        return self.merged or bool(self.added_adapters)

    def effective_weight(self) -> Tensor:
        """W + sum over active adapters of scaling * B A, in W's layout and dtype, differentiable in
        the factors."""
        base = self.base_operands()[0] if self.stack is None else self._own_weight()
        return self._with(base, self.added_adapters if self.changes_weight else ())

    def weight_of_row(self, name: str | None) -> Tensor:
        """W + scaling * B A of one adapter, or W alone, as `effective_weight`."""
        return self._with(self._own_weight(), () if name is None else (name,))

    def _own_weight(self) -> Tensor:
        """W; of quantised matrices all, which their library dequantises."""
        return self.weight if self.stack is None else whole_parameter(self.module, self.parameter)

    def _with(self, weight: Tensor, names: Sequence[str]) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            for name in names:
                (lora_a, lora_b), spec = self.factors(name), self.spec_of(name)
                assert spec is not None
                scaled = b_by_expert(lora_b, self.count) * spec.scaling
                delta = self.matrix(scaled @ a_by_expert(lora_a, self.count))
                weight = weight + delta.to(weight.dtype).view(weight.shape)
        return weight

    @property
    def can_merge(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.stack is None

    @property
    def weight_name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return repr(self.parameter)

    def example(self, rows: int | None, block: RowAdapters | None) -> None:
        return None

    def _decide_for(self, names: Sequence[str], call: Call) -> Decision:
        return self.module.decide(call)

    def extra_repr(self) -> str:
        return f"{self.parameter}: {list(self.weight_shape)}{super().extra_repr()}"
