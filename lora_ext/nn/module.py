"""LoRAModule: a module of any class with adapters on its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

from torch import Tensor, nn

from ..call import Call, Decision, Path
from ..call.decision import of_rows
from ..quantized.layers import own_type
from ..quantized.stack import QuantizedStack
from ..quantized.stacks import parameter_names, parametrized, stack_of
from ..rows.rows_apart import by_adapter
from ..torch_state import is_plain, is_transformed
from .over import Over, check_own_forward, empty_over
from .parameter import LoRAParameter

# The child that holds the adapters.
_LAYERS = "lora"


class LoRAModule(Over):
    """A module of any class with adapters on some of its parameters.

        y = base(x) with W + scaling * B A instead of each such parameter W

    Its class is made for the base's class and also derives from it, such as
    LoRAQwen3MoeTopKRouter. It shares the base's tensors, mode and hooks, and keeps their names and
    keys; `around` makes one. W + scaling * B A is computed in each forward, so this is for small
    parameters, such as a router's weight; `lora_ext.nn.LoRAExperts` is better for experts.

    Attributes:
        lora: parameter's name -> `LoRAParameter`.
        kind: this class, or the subclass of it in this package that the module's class derives
            from.
        has_dropout: whether adapters on its parameters may have dropout, which W + scaling * B A
            has no place for.
        base_type: the class of the module that it replaces.
    """

    lora: nn.ModuleDict
    own_names = Over.own_names | {_LAYERS}
    has_dropout = False

    @classmethod
    def around(cls, base: nn.Module, parameters: Iterable[str] | None = None) -> Any:
        """The module that replaces `base`, without an adapter.

        Args:
            base: any module; it is not changed.
            parameters: names of those that may have adapters; None for the default of the class.

        Raises:
            TypeError: base has a forward on the instance, or parametrized parameters.
        """
        name = f"lora_ext.nn.{cls.__name__}"
        check_own_forward(name, base)
        cls._check_stored(name, base)
        cls._check_base(base)
        module = empty_over(cls, own_type(type(base)))
        module._adopt(base)
        names = adaptable_parameters(base) if parameters is None else tuple(parameters)
        transposed = bool(getattr(base, "is_transposed", False))
        layers = {}
        for each in names:
            is_stack = len(_shape(base, each)) == 3
            layers[each] = LoRAParameter(module, each, transposed and is_stack)
        module.lora = nn.ModuleDict(layers)
        return module

    @classmethod
    def _check_stored(cls, name: str, base: nn.Module) -> None:
        """Raises TypeError for a module some of whose parameters are computed."""
        if parametrized(base):
            raise TypeError(
                f"{name}: expected a {type(base).__name__} with plain parameters, but some are "
                "computed; leave the module out by exclude_modules, or "
                "torch.nn.utils.parametrize.remove_parametrizations first"
            )

    @classmethod
    def _check_base(cls, base: nn.Module) -> None:
        """Raises TypeError or ValueError for a module that `around` cannot replace."""

    def layers(self) -> list[LoRAParameter]:
        """The parameters that may have adapters."""
        return list(self._modules[_LAYERS]._modules.values())  # type: ignore[union-attr,return-value]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = (layer.adapters_of_rows() for layer in self.layers())
        rows = next((block for block in found if block is not None), None)
        return self.decide(Call(None, rows)).run(*args, **kwargs)

    def decide(self, call: Call) -> Decision:
        """How a forward that gets the module's arguments is computed."""
        names = self._names(call.rows)
        if names:
            run = partial(self._mixed, names, call.rows)
            return Decision(run, Path.ADDED, of_rows(names))
        reason = "the module's own forward with a full weight W + scaling B A"
        return Decision(self._of_all_rows, Path.ADDED, reason)

    def _of_all_rows(self, *args: Any, **kwargs: Any) -> Any:
        """A forward whose rows have the same adapters, or none."""
        layers = self.layers()
        if not any(layer.changes_weight for layer in layers):
            return self.base_type.forward(self, *args, **kwargs)
        weights = {
            layer.parameter: layer.effective_weight()
            for layer in layers
            if layer.changes_weight or layer.stack is not None
        }
        return self.with_tensors(weights).forward(*args, **kwargs)

    def _names(self, rows: Any) -> list[str]:
        """The adapters of a block that the module has; none of no block."""
        if rows is None:
            return []
        layers = [layer for layer in self.layers() if layer.adapters_enabled]
        for layer in layers:
            layer.check_unmerged()
        here = {name for layer in layers for name in layer.row_names(rows)}
        return [name for name in rows.names if name in here]

    def _mixed(self, names: Sequence[str], rows: Any, *args: Any, **kwargs: Any) -> Any:
        """A forward whose rows have different adapters: one call for the rows of each."""
        x: Any = args[0] if len(args) == 1 and not kwargs else None
        if not is_plain(x) or x.dim() < 2 or is_transformed():
            self._refuse_rows("gets more than one tensor x, or is under a transform of torch.func")

        def call(name: str | None, own: Tensor) -> Any:
            weights = {
                layer.parameter: layer.weight_of_row(name if layer.has(name) else None)
                for layer in self.layers()
            }
            return self.with_tensors(weights).forward(own)

        return by_adapter(call, x, rows.index_for(x, names), names)

    def _refuse_rows(self, reason: str) -> NoReturn:
        raise ValueError(
            "lora_ext.use_adapters: expected a layer whose rows can have different adapters, but a "
            f"{type(self).__name__} {reason}; choose one adapter for the whole batch by "
            "lora_ext.set_adapter, or leave the module out by exclude_modules"
        )

    def with_tensors(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """A module of the base's class with other tensors instead of parameters, for one forward:
        this module is not changed, so threads do not affect each other."""
        kind: Any = self.base_type
        if parametrized(self):  # in whose class torch put a property for each such parameter
            kind = kind.__bases__[0]
        module = kind.__new__(kind)
        module.__dict__.update(self.__dict__)
        module.__dict__.update(weights)  # takes precedence over `_parameters`
        return module

    def __getstate__(self) -> Any:
        return self.__dict__


def adaptable_parameters(module: nn.Module) -> tuple[str, ...]:
    """The parameters of a module that may have adapters, in the order in which PEFT wraps them:
    stacks of matrices, or matrices if it has no stacks."""
    shapes = {name: _shape(module, name) for name in parameter_names(module)}
    stacks = tuple(name for name, shape in shapes.items() if len(shape) == 3)
    return stacks or tuple(name for name, shape in shapes.items() if len(shape) == 2)


def _shape(module: nn.Module, name: str) -> tuple[int, ...]:
    """The shape of a parameter, plain or quantised; () of one that is computed otherwise."""
    found = stack_of(module, name)
    if isinstance(found, QuantizedStack):
        return found.shape
    return tuple(found.shape) if isinstance(found, Tensor) else ()
