"""Modules with adapters on some of their matrices, such as a mixture's router with `all-linear`.

    W' = W + scaling * B A        computed as in PEFT, with the same bits: a router compares logits

Such a W is small. In PEFT most of the time is spent on registering and removing a parametrization;
here the module is called with W' instead of W.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any

from torch import Tensor
from torch.func import functional_call

from ..call import Decision, Path
from ..call.decision import of_rows
from ..dtypes import FLOATS
from ..quantized.stacks import stack_of
from ..rows.row_adapters import RowAdapters
from ..rows.rows_apart import by_adapter
from ..torch_state import is_exported, is_plain, is_transformed
from .chain import Chain


def are_all(chain: Chain) -> bool:
    """Whether each parameter of the chain is a matrix."""
    stored = [stack_of(chain.base, name) for _, name, _ in chain.targets]
    return all(isinstance(each, Tensor) and each.dim() == 2 for each in stored)


def reason(chain: Chain, by_row: bool = False) -> str:
    """Why PEFT's own forward is needed, or ""."""
    if any(chain.base._parameters[name].dtype not in FLOATS for _, name, _ in chain.targets):
        return "a parameter is not of a floating dtype"
    if is_exported():
        return "the model is exported or traced"
    return "a transform of torch.func or forward-mode AD is active" if is_transformed() else ""


def decision(
    chain: Chain, names: Sequence[str], rows: RowAdapters | None, others: Callable[..., Any]
) -> Decision:
    """That for the module with W + B A instead of each W.

    Args:
        names: the adapters that rows have, if they have different ones.
        rows: the block that says which row has which; None: they all have the chain's.
        others: PEFT's own forward, for arguments that need it.
    """

    def call(name: str | None, part: Tensor) -> Any:
        targets = [
            each._replace(adapters=[own for own in each.adapters if own == name])
            for each in chain.targets
        ]
        return _called(chain._replace(targets=targets), (part,), {})

    def run(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("adapter_names"):
            return others(*args, **kwargs)
        if rows is None:
            return _called(chain, args, kwargs)
        x, *more = args
        if more or kwargs or not is_plain(x) or x.dim() < 2:
            return others(*args, **kwargs)
        return by_adapter(call, x, rows.index_for(x, names), names)

    def detail() -> tuple[Path, str]:
        how = "the module is called with W + B A, as PEFT makes it"
        return Path.ADDED, f"{of_rows(names)}: {how}, for the rows of each" if names else how

    return Decision(run, Path.ADDED, "", detail)


def _called(chain: Chain, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    # In PEFT's order of operations, to get its bits.
    sums = {
        name: chain.base._parameters[name] + reduce(add, map(wrapper.get_delta_weight, adapters))
        for wrapper, name, adapters in chain.targets
        if adapters
    }
    return functional_call(chain.base, sums, args, dict(kwargs), tie_weights=False)
