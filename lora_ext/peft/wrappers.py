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
    """The decision of the outermost wrapper, for arguments that suit the module: others are checked
    as it runs."""
    rows, args, kwargs = call[1:]
    chain = chain_of(layer, rows)
    state = chain_state(chain)
    kind: Any = matrices if state is None and matrices.are_all(chain) else experts
    merged = [wrapper.merged_adapters for wrapper, _, _ in chain.targets if wrapper.merged_adapters]
    if rows is not None and merged:
        state = PEFT, f"{merged[0]} are merged into the weight; call unmerge_adapter first"
    reason = "" if state is not None else kind.reason(chain, by_row=rows is not None)
    if reason:
        state = (PEFT, reason) if has_updates(chain) else base_state(chain)
    if state is not None:
        return _of_others(layer, chain, call, *state)
    reason = "these arguments, or a transform of torch.func, are not supported"
    others = _of_others(layer, chain, call, PEFT if has_updates(chain) else BASE, reason)
    path, names, note = FUSED if kind is experts else ADDED, [], ""
    if not has_updates(chain):  # quantised
        path, note = base_state(chain) if rows is None else (BASE, NONE_OF_ROWS)
        rows = None
    elif rows is not None:
        here = {name for target in chain.targets for name in target.adapters}
        names = [name for name in rows.names if name in here]
        note = of_rows(names)
    note = note and f"{note}: "
    if kind is experts:
        given = None if rows is None else names
        found = experts.decided(chain, lambda x, *_, **__: others.run(x), path, note, given, rows)
        return found._replace(run=lambda x: found.run(x, *args, **kwargs))

    def run(x: Any) -> Any:
        operands = matrices.operands(chain, (x, *args), kwargs)
        if operands is None or (rows is not None and not matrices.has_rows(operands)):
            return others.run(x)
        if rows is None:
            return matrices.forward(chain, operands)
        return _by_adapter(chain, names, x, rows)

    each = "" if rows is None else ", for the rows of each"
    return Decision(run, path, f"{note}{matrices.SUM}{each}")


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
