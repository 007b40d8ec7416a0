"""PEFT's wrappers of parameters in a batch whose rows have different adapters, which PEFT refuses.

experts     `lora_experts` with the adapter of each token
matrices    the module is called once for each adapter, with W + B A of this adapter
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from ..nn.row_adapters import RowAdapters
from ..nn.rows_apart import by_adapter
from ..torch_state import is_plain
from . import experts, matrices
from .chain import Chain, chain_of, chain_state
from .reasons import ADDED, BASE, FUSED, PEFT

_BY_ROW = "each row its own adapter"


def forward(layer: Any, x: Any, rows: RowAdapters, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The forward of the outermost wrapper within a block, whose adapters are not disabled."""
    kwargs.pop("alora_offsets", None)
    chain, names = _chain_of(layer, rows)
    reason = _reason(chain)
    if reason:
        _refuse(chain, rows, reason)
    if not names:
        is_ours = chain_state(chain) is None  # of experts in 4 bits
        operands = experts.operands(chain, (x, *args), kwargs) if is_ours else None
        if operands is None:
            return chain.base(x, *args, **kwargs)
        return experts.forward(chain, operands)
    if matrices.are_all(chain):
        return _of_matrices(chain, names, x, rows, args, kwargs)
    operands = experts.operands(chain, (x, *args), kwargs)
    if operands is None:
        _refuse(chain, rows, "these arguments, or a transform of torch.func, are not supported")
    index = rows.index_for(operands[0], names)
    return experts.forward_by_row(chain, operands, names, index)


def path(layer: Any, rows: RowAdapters) -> tuple[str, str]:
    """(path, reason) of the outermost wrapper within a block, for `lora_ext.explain`."""
    chain, names = _chain_of(layer, rows)
    reason = _reason(chain)
    if reason:
        return PEFT, f"{_BY_ROW}, which PEFT refuses: {reason}"
    if not names:
        why = "none of the adapters that rows have is in this layer"
        is_ours = chain_state(chain) is None
        return BASE, f"{why}: {experts.rows_of_experts(chain)}" if is_ours else why
    what = f"{_BY_ROW}, {len(names)} in this batch"
    if matrices.are_all(chain):
        return ADDED, f"{what}: {matrices.SUM}, for the rows of each"
    return FUSED, f"{what}: {experts.rows_of_experts(chain)}"


def _chain_of(layer: Any, rows: RowAdapters) -> tuple[Chain, list[str]]:
    """The chain, and the adapters of the block that any of its parameters has."""
    chain = chain_of(layer, rows.names)
    here = {name for target in chain.targets for name in target.adapters}
    return chain, [name for name in rows.names if name in here]


def _reason(chain: Chain) -> str:
    """Why rows cannot have different adapters, for any x, or ""."""
    for target in chain.targets:
        merged = target.wrapper.merged_adapters
        if merged:
            return f"{merged} are merged into the weight; call unmerge_adapter first"
    state = chain_state(chain)
    if state is not None:
        return state[1] if state[0] == PEFT else ""
    if matrices.are_all(chain):
        return matrices.reason(chain)
    return experts.reason(chain, by_row=True)


def _refuse(chain: Chain, rows: RowAdapters, reason: str) -> NoReturn:
    where = "lora_ext.use_adapters: expected"
    if rows.is_pefts:  # PEFT's own words, too, on which its callers may rely
        where = (
            "lora.ParamWrapper does not support mixed adapter batches yet. lora_ext.accelerate "
            "expected"
        )
    raise ValueError(
        f"{where} a layer whose rows can have different adapters, but in a "
        f"{type(chain.base).__name__} {reason}; choose one adapter for the whole batch by "
        "model.set_adapter, or leave the module out of target_parameters"
    )


def _of_matrices(
    chain: Chain,
    names: list[str],
    x: Any,
    rows: RowAdapters,
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    if args or kwargs or not is_plain(x) or x.dim() < 2 or not matrices.are_supported():
        _refuse(
            chain, rows, "the module gets more than one plain x, or under a transform of torch.func"
        )
    index = rows.index_for(x, names)

    def call(place: int, own: Tensor) -> Any:
        name = names[place] if place >= 0 else None
        targets = [
            target._replace(adapters=[name] if name in target.adapters else [])
            for target in chain.targets
        ]
        return matrices.forward(chain._replace(targets=targets), ((own,), {}))

    return by_adapter(call, x, index, len(names))
