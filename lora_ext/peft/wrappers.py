"""How PEFT's wrappers of a module's parameters are computed, also for rows with different adapters,
which PEFT refuses.

experts     `lora_experts`, with the adapters of all tokens or of each
matrices    the module is called with W + B A; for rows, once for each adapter
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from ..call import Decision
from ..nn.row_adapters import RowAdapters
from ..nn.rows_apart import by_adapter
from . import expert_dropout, experts, matrices
from .chain import Chain, base_state, chain_of, chain_state, has_updates
from .layer import NONE_OF_ROWS, Call, by_row, names_of
from .reasons import ADDED, BASE, FUSED, PEFT


def decide(layer: Any, call: Call) -> Decision:
    """The decision of the outermost wrapper; with x None, for arguments that suit the module."""
    given, rows, args, kwargs = call
    chain = chain_of(layer, None if rows is None else rows.names)
    state = chain_state(chain)
    are_matrices = state is None and matrices.are_all(chain)
    kind: Any = matrices if are_matrices else experts
    operands: Any = ()
    if state is None:
        reason = kind.reason(chain, by_row=rows is not None)
        if not reason and given is not None:
            operands = kind.operands(chain, (given, *args), kwargs)
            if operands is None or (are_matrices and rows and not matrices.has_rows(operands)):
                reason = "these arguments, or a transform of torch.func, are not supported"
        if reason:
            state = (PEFT, reason) if has_updates(chain) else base_state(chain)
    if rows is not None:
        merged = next(
            filter(None, (target.wrapper.merged_adapters for target in chain.targets)), ()
        )
        if merged:
            state = PEFT, f"{merged} are merged into the weight; call unmerge_adapter first"
        return _of_rows(chain, call, rows, state, kind, operands)
    if state is not None:

        def pefts(x: Any) -> Any:
            expert_dropout.refuse_pefts_forward(chain)
            return layer.pefts_forward(x, *args, **kwargs)

        return Decision(pefts, *state)
    path, why = (ADDED, matrices.SUM) if are_matrices else (FUSED, experts.rows_of_experts(chain))
    if not has_updates(chain):  # quantised
        path, note = base_state(chain)
        why = f"{note}: {why}"
    return Decision(lambda _: kind.forward(chain, operands), path, why)


def _of_rows(
    chain: Chain,
    call: Call,
    rows: RowAdapters,
    state: tuple[str, str] | None,
    kind: Any,
    operands: Any,
) -> Decision:
    """`decide` within a block."""
    here = {name for target in chain.targets for name in target.adapters}
    names = names_of(None, here, rows)
    if state is not None and state[0] == PEFT:
        why = f"each row its own adapter, which PEFT refuses: {state[1]}"
        return Decision(lambda _: _refuse(chain, rows, state[1]), PEFT, why)
    if state is not None:
        return Decision(lambda x: chain.base(x, *call.args, **call.kwargs), BASE, NONE_OF_ROWS)
    if kind is matrices:
        why = by_row(rows, names, f"{matrices.SUM}, for the rows of each")
        return Decision(lambda x: _of_matrices(chain, names, x, rows), ADDED, why)
    what = experts.rows_of_experts(chain)
    if not names:  # quantised
        return Decision(lambda _: experts.forward(chain, operands), BASE, f"{NONE_OF_ROWS}: {what}")

    def of_experts(_: Any) -> Tensor:
        index = rows.index_for(operands[0], names)
        return experts.forward_by_row(chain, operands, names, index)

    return Decision(of_experts, FUSED, by_row(rows, names, what))


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


def _of_matrices(chain: Chain, names: list[str], x: Tensor, rows: RowAdapters) -> Any:
    def call(place: int, own: Tensor) -> Any:
        name = names[place] if place >= 0 else None
        targets = [
            target._replace(adapters=[name] if name in target.adapters else [])
            for target in chain.targets
        ]
        return matrices.forward(chain._replace(targets=targets), ((own,), {}))

    return by_adapter(call, x, rows.index_for(x, names), len(names))
