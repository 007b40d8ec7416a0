"""How PEFT's wrappers of a module's parameters are computed, also for rows with different adapters,
which PEFT refuses.

experts     `lora_experts`, with the adapters of all tokens or of each
matrices    the module is called with W + B A; for rows, once for each adapter
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from ..call import Decision
from ..call.decision import of_rows
from ..nn.row_adapters import RowAdapters
from ..nn.rows_apart import by_adapter
from . import expert_dropout, experts, matrices
from .chain import Chain, base_state, chain_of, chain_state, has_updates
from .layer import NONE_OF_ROWS, Call
from .reasons import ADDED, BASE, FUSED, PEFT


def decide(layer: Any, call: Call) -> Decision:
    """The decision of the outermost wrapper; with x None, for arguments that suit the module."""
    given, rows, args, kwargs = call
    is_mixed = rows is not None
    chain = chain_of(layer, rows)
    here = dict.fromkeys(name for target in chain.targets for name in target.adapters)
    names = list(here) if rows is None else [name for name in rows.names if name in here]
    state = chain_state(chain)
    operands: Any = ()
    kind: Any = matrices if state is None and matrices.are_all(chain) else experts
    merged = [wrapper.merged_adapters for wrapper, _, _ in chain.targets if wrapper.merged_adapters]
    if is_mixed and merged:
        state = PEFT, f"{merged[0]} are merged into the weight; call unmerge_adapter first"
    if state is None:
        reason = kind.reason(chain, by_row=is_mixed)
        if not reason and given is not None:
            operands = kind.operands(chain, (given, *args), kwargs)
            if operands is None or (is_mixed and kind is matrices and not kind.has_rows(operands)):
                reason = "these arguments, or a transform of torch.func, are not supported"
        if reason:
            state = (PEFT, reason) if has_updates(chain) else base_state(chain)
    if state is not None:
        return _of_others(layer, chain, call, *state)
    path, note = FUSED if kind is experts else ADDED, of_rows(names) if is_mixed else ""
    if not has_updates(chain):  # quantised
        path, note = (BASE, NONE_OF_ROWS) if is_mixed else base_state(chain)
        rows = None

    def run(x: Any) -> Any:
        if rows is None:
            return kind.forward(chain, operands)
        if kind is matrices:
            return _by_adapter(chain, names, x, rows)
        return experts.forward_by_row(chain, operands, names, rows.index_for(operands[0], names))

    def detail(_: Any) -> tuple[str, str]:
        what = f"{matrices.SUM}{', for the rows of each' * is_mixed}"
        what = experts.rows_of_experts(chain) if kind is experts else what
        return path, f"{note}: {what}" if note else what

    return Decision(run, path, note, detail)


def _of_others(layer: Any, chain: Chain, call: Call, path: str, reason: str) -> Decision:
    """The decision for PEFT's own forward; for rows the module alone, or an error."""
    _, rows, args, kwargs = call

    def run(x: Any) -> Any:
        expert_dropout.refuse_pefts_forward(chain)
        return layer.pefts_forward(x, *args, **kwargs)

    if rows is None:
        return Decision(run, path, reason)
    if path == BASE:
        return Decision(lambda x: chain.base(x, *args, **kwargs), BASE, NONE_OF_ROWS)
    why = f"each row its own adapter, which PEFT refuses: {reason}"
    return Decision(lambda _: _refuse(chain, rows, reason), PEFT, why)


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


def _by_adapter(chain: Chain, names: list[str], x: Tensor, rows: RowAdapters) -> Any:
    def call(place: int, own: Tensor) -> Any:
        name = names[place] if place >= 0 else None
        targets = [
            target._replace(adapters=[name] if name in target.adapters else [])
            for target in chain.targets
        ]
        return matrices.forward(chain._replace(targets=targets), ((own,), {}))

    return by_adapter(call, x, rows.index_for(x, names), len(names))
