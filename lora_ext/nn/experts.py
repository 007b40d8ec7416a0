"""LoRAExperts: the experts of a mixture with adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..call import Call, Decision, Path
from ..call.decision import of_rows
from ..dtypes import FLOATS
from ..experts import Experts, ExpertsAdapter, explained, lora_experts
from ..experts.decorated import (
    in_order,
    is_decorated,
    is_parallel,
    obstacle,
    quantised_note,
    together,
    up_name,
)
from ..quantized.stack import QuantizedStack
from ..quantized.stacks import PARAMETRIZED, parameter_names, stack_of, stacks_of
from ..rows.row_adapters import RowAdapters
from .adapter_spec import MAX_RANK
from .module import LoRAModule
from .parameter import LoRAParameter

# Attributes that transformers' decorator sets on each instance, in all releases.
_MARKS = ("has_bias", "is_transposed")


def is_experts(module: nn.Module) -> bool:
    """Whether it is a module of experts, with or without adapters, whose class is decorated with
    transformers' `use_experts_implementation`: its weights are two stacks ``[E, ...]``."""
    kind = module.base_type if isinstance(module, LoRAModule) else type(module)
    return all(mark in module.__dict__ for mark in _MARKS) and is_decorated(kind)


class AdaptedExperts(NamedTuple):
    """Experts of a decorated module with adapters, in a model of ours or of PEFT's.

    Attributes:
        module: the decorated module.
        kind: its class, or the class that it replaces.
        names: the adapters that rows have, if they have different ones.
        rows: the block that says which row has which; None: they all have the same.
        adapted: returns the experts and, by name, the adapters that each projection has now.
        others: the forward for arguments that are not those of experts.
    """

    module: Any
    kind: type
    names: Sequence[str]
    rows: RowAdapters | None
    adapted: Callable[[], tuple[Experts, dict[str, ExpertsAdapter], dict[str, ExpertsAdapter]]]
    others: Callable[..., Any]

    def decision(self) -> Decision:
        """That for `lora_experts`."""
        return Decision(self._run, Path.FUSED, "", self._detail, self)

    def workspace_bytes(self) -> int:
        """Bytes of the experts that are dequantised at a time."""
        found = (together(stack) * stack.matrix_bytes for stack in stacks_of(self.module))
        return max(found, default=0)

    def _operands(self) -> tuple[Experts, list[Any], list[Any]]:
        """The experts, and the adapters of each projection: None for one that it lacks."""
        experts, *sides = self.adapted()
        up, down = ([side.get(name) for name in self.names or side] for side in sides)
        return experts, up, down

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        found, (experts, up, down) = in_order(self.kind, args, kwargs), self._operands()
        if not (found and experts.fit(*found)):
            return self.others(*args, **kwargs)
        x, index, weights = found
        own = None if self.rows is None else self.rows.index_for(x, self.names)
        return lora_experts(experts, x, index, weights, up, down, own)

    def _detail(self) -> tuple[Path, str]:
        experts, up, down = self._operands()
        sides = ("down_proj", down), (up_name(self.module), up)
        adapted = ", ".join(name for name, side in sides if any(side))
        p = max((adapter.dropout for adapter in (*up, *down) if adapter is not None), default=0)
        each = f"{of_rows(self.names)}: " if self.names else ""
        how = explained(experts, up, down, bool(self.names))
        updates = f", updates of {adapted}" if adapted else ""
        dropout = f", dropout {p}" if p else ""
        return Path.FUSED, f"{each}{how}{updates}{dropout}{quantised_note(self.module)}"


class LoRAExperts(LoRAModule):
    """The experts of a mixture with low-rank adapters on their frozen stacks of weights.

        z = x W1_e^T (+ b1_e) + s1 (drop(x) A1_e^T) B1_e^T     h = gate(z)
        y = h W2_e^T (+ b2_e) + s2 (drop(h) A2_e^T) B2_e^T     out[t] = sum over its experts of w y

    for the experts e that the router selected for token t. It replaces modules of transformers
    whose class is decorated with `use_experts_implementation`; its class is made for each of them
    and also derives from theirs. `lora` has a `LoRAParameter` for each stack: ``gate_up_proj``
    (``up_proj`` if there is no gate) and ``down_proj``, each with lora_a ``[E r, in]`` and lora_b
    ``[out, r E]`` as in PEFT's ParamWrapper. In training a token has one mask of x for all of its
    experts, and one of h for each; the active adapters of a stack share it and have one dropout.

    The stacks may be in bitsandbytes' 4 bits, or in torchao's int8 or float8: each expert that has
    rows is dequantised for its own product, and no other, also where no adapter is active.
    """

    has_dropout = True

    @classmethod
    def _check_stored(cls, name: str, base: nn.Module) -> None:
        for each in parameter_names(base):
            reason = stack_of(base, each)
            if reason == PARAMETRIZED:
                super()._check_stored(name, base)
            if isinstance(reason, str):
                raise ValueError(
                    f"{name}: expected quantised experts that can be dequantised one at a time, "
                    f"but of {each!r}: {reason}; exclude_modules=['experts'] leaves them out"
                )

    @classmethod
    def _check_base(cls, base: nn.Module) -> None:
        if not is_experts(base) or isinstance(base, LoRAModule):
            raise TypeError(
                "lora_ext.nn.LoRAExperts: expected experts under transformers' "
                "use_experts_implementation, but got "
                f"{type(base).__module__}.{type(base).__qualname__}"
            )
        found = [stack_of(base, each) for each in parameter_names(base)]
        dtypes = {p.dtype for p in found if isinstance(p, Tensor) and p.dim() == 3}
        problem = ""
        if is_parallel(base):
            problem = "all experts in this process, but they are expert parallel"
        elif not dtypes <= set(FLOATS):
            problem = f"weights that are not quantised, but got {sorted(map(str, dtypes))}"
        if problem:
            raise ValueError(
                f"lora_ext.nn.LoRAExperts: expected {problem}; exclude_modules=['experts'] leaves "
                "them out"
            )

    def _pair(self) -> tuple[LoRAParameter, LoRAParameter]:
        """The layers of the first projection and of the second."""
        layers: Any = self._modules["lora"]
        return layers[up_name(self)], layers["down_proj"]

    def decide(self, call: Call) -> Decision:
        names = self._names(call.rows)
        rows: Any = call.rows if names else None
        if rows is None and not (any(map(_adds, self._pair())) or stacks_of(self)):
            return super().decide(call)
        reason = self._obstacle() if rows is None else obstacle(self)
        if reason:
            what = "transformers' forward with W + scaling B A"
            if rows is not None:
                what = "rows with different adapters are refused"
            run = partial(self._by_others, rows, reason)
            return Decision(run, Path.ADDED, f"{reason}: {what}")
        others = partial(self._by_others, rows, "these arguments are not those of experts")
        adapted = partial(self._adapted, names)
        return AdaptedExperts(self, self.base_type, names, rows, adapted, others).decision()

    def _adapted(self, names: Sequence[str]) -> tuple:
        """As `AdaptedExperts.adapted`."""
        experts, layers = Experts.of(self, self.lora), self._pair()
        up, down = map(_weight, layers, (experts.up, experts.down))
        experts = experts._replace(up=up, down=down)
        return experts, *(self._adapters(layer, names) for layer in layers)

    def _adapters(
        self, layer: LoRAParameter, names: Sequence[str] = ()
    ) -> dict[str, ExpertsAdapter]:
        """The adapters of a projection that all rows have now, or those of some names."""
        names = names or (layer.added_adapters if _adds(layer) else ())
        specs = {name: layer.spec_of(name) for name in names if layer.has(name)}
        return {
            name: ExpertsAdapter(
                *layer.factors(name), spec.scaling, spec.lora_dropout if self.training else 0.0
            )
            for name, spec in specs.items()
            if spec is not None
        }

    def _by_others(self, rows: RowAdapters | None, reason: str, *args: Any, **kwargs: Any) -> Any:
        """A forward that `lora_experts` cannot compute; RuntimeError where W + scaling B A would
        leave out the dropout of an update."""
        if rows is not None:
            self._refuse_rows(f"needs transformers' own forward: {reason}")
        found = [each for side in self._pair() for each in self._adapters(side).values()]
        most = max((each.dropout for each in found), default=0.0)
        if most > 0.0:
            raise RuntimeError(
                f"lora_ext.nn.LoRAExperts: expected experts that lora_ext computes for dropout "
                f"{most} in training, but got a forward with W + scaling B A, which has none: "
                f"{reason}; call model.eval(), or train with lora_dropout=0"
            )
        return self._of_all_rows(*args, **kwargs)

    def _obstacle(self) -> str:
        """Why `lora_experts` cannot compute the layer for any x, or ""."""
        for layer in self._pair():
            if sum(map(layer.rank, layer.added_adapters)) > MAX_RANK:
                return f"the ranks of the active adapters sum to more than {MAX_RANK}"
        return obstacle(self)


def _weight(layer: LoRAParameter, own: Tensor | QuantizedStack) -> Tensor | QuantizedStack:
    """The weight of a projection: the module's own, or the merged one."""
    return own if isinstance(own, QuantizedStack) else layer.base_operands()[0]


def _adds(layer: LoRAParameter) -> bool:
    """Whether a forward now adds the update of an adapter that is not merged."""
    return layer.changes_weight and bool(layer.added_adapters)
