"""PEFT's wrapper of a parameter (`target_parameters`) with another forward.

PEFT nests one wrapper in another for each parameter of a module, and each registers a
parametrization, W + B A, during the module's forward. Here the outermost wrapper processes the
whole chain, also for rows with different adapters, which PEFT refuses:

    experts     `lora_experts`, with the adapters of all tokens or of each
    matrices    the module is called with W + B A; for rows, once for each adapter
"""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

from peft.tuners.lora import layer as peft_layers

from ..call import Call, Decision, Path
from ..rows.row_adapters import RowAdapters
from . import experts, matrices
from .chain import Chain, base_state, chain_of, chain_state
from .layer import NONE_OF_ROWS, Accelerated, forward_over


class ParamWrapper(Accelerated, peft_layers.ParamWrapper):
    """`peft.tuners.lora.layer.ParamWrapper`, the outermost of its chain, with another forward and
    nothing else.

        forward(hidden_states, top_k_index, top_k_weights)     for experts: `lora_ext.experts`
        forward(...)     for any other module, with W + B A for each W of the chain

    Within a block of `lora_ext.use_adapters`, and with PEFT's adapter_names, rows have different
    adapters.

    Parameters, state dict, merging and switching are PEFT's. `lora_ext.accelerate` sets this class
    on a wrapper, `lora_ext.decelerate` restores PEFT's.
    """

    # Set on the instance by `accelerate(model, expert_dropout=p)`; a graph guards what is declared.
    expert_dropout: float = 0.0

    forward = forward_over(peft_layers.ParamWrapper)

    def decide(self, call: Call) -> Decision:
        """That for arguments that suit the module: others are checked as it runs."""
        found = self._decide(call.rows)
        return found._replace(run=lambda x: found.run(x, *call.args, **call.kwargs))

    def _decide(self, rows: RowAdapters | None) -> Decision:
        """`decide`, whose run takes all arguments."""
        chain = chain_of(self, rows)
        state = chain_state(chain)
        kind: Any = matrices if state is None and matrices.are_all(chain) else experts
        merged = [each.wrapper.merged_adapters for each in chain.targets]
        if rows is not None and any(merged):
            names = next(filter(None, merged))
            state = Path.PEFT, f"{names} are merged into the weight; call unmerge_adapter first"
        reason = "" if state is not None else kind.reason(chain, by_row=rows is not None)
        here = {name for target in chain.targets for name in target.adapters}
        if reason:
            state = (Path.PEFT, reason) if here else base_state(chain)
        if state is not None:
            return _of_others(self, chain, rows, *state)
        words = Path.PEFT if here else Path.BASE, "these arguments are not supported"
        others = _of_others(self, chain, rows, *words).run
        if here:
            names = [] if rows is None else [name for name in rows.names if name in here]
            return kind.decision(chain, names, rows, others)
        found = kind.decision(chain, [], None, others)  # quantised
        path, note = base_state(chain) if rows is None else (Path.BASE, NONE_OF_ROWS)
        detail = lambda: (path, f"{note}: {found.explained()[1]}")  # noqa: E731
        return found._replace(path=path, detail=detail)

    def example(self, rows: int | None, block: RowAdapters | None) -> None:
        return None


def _of_others(
    layer: Any, chain: Chain, rows: RowAdapters | None, path: Path, reason: str
) -> Decision:
    """The decision for PEFT's own forward; for rows the module alone, or an error."""

    def run(*args: Any, **kwargs: Any) -> Any:
        experts.refuse_pefts_forward(chain, reason)
        return layer.pefts_forward(*args, **kwargs)

    if rows is None:
        return Decision(run, path, reason)
    if path == Path.BASE:
        return Decision(chain.base, Path.BASE, NONE_OF_ROWS)
    why = f"each row its own adapter, which PEFT refuses: {reason}"
    return Decision(partial(_refuse, chain, rows, reason), Path.PEFT, why)


def _refuse(chain: Chain, rows: RowAdapters, reason: str, *_: Any, **__: Any) -> NoReturn:
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
