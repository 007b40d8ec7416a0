"""PEFT's wrapper of a parameter (`target_parameters`) with another forward.

PEFT nests one wrapper in another for each parameter of a module, and each registers a
parametrization, W + B A, during the module's forward. Here the outermost wrapper processes the
whole chain, also for rows with different adapters, which PEFT refuses:

    experts     `lora_experts`, with the adapters of all tokens or of each
    matrices    the module is called with W + B A; for rows, once for each adapter
"""

from __future__ import annotations

from typing import Any, NoReturn

from peft.tuners.lora import layer as peft_layers

from ..call import Call, Decision, Path
from ..call.decision import of_rows
from ..experts import decorated
from ..nn.row_adapters import RowAdapters
from . import experts, matrices
from .chain import Chain, base_state, chain_of, chain_state, has_updates
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
        rows, args, kwargs = call[1:]
        chain = chain_of(self, rows)
        state = chain_state(chain)
        kind: Any = matrices if state is None and matrices.are_all(chain) else experts
        merged = [each.wrapper.merged_adapters for each in chain.targets]
        if rows is not None and any(merged):
            names = next(filter(None, merged))
            state = Path.PEFT, f"{names} are merged into the weight; call unmerge_adapter first"
        reason = "" if state is not None else kind.reason(chain, by_row=rows is not None)
        if reason:
            state = (Path.PEFT, reason) if has_updates(chain) else base_state(chain)
        if state is not None:
            return _of_others(self, chain, call, *state)
        reason = "these arguments, or a transform of torch.func, are not supported"
        others = Path.PEFT if has_updates(chain) else Path.BASE
        others = _of_others(self, chain, call, others, reason)
        path, names, note = Path.FUSED if kind is experts else Path.ADDED, [], ""
        if not has_updates(chain):  # quantised
            path, note = base_state(chain) if rows is None else (Path.BASE, NONE_OF_ROWS)
            rows = None
        elif rows is not None:
            here = {name for target in chain.targets for name in target.adapters}
            names = [name for name in rows.names if name in here]
            note = of_rows(names)

        def run(x: Any) -> Any:
            found = kind.forward(chain, x, args, kwargs, names, rows)
            return others.run(x) if found is NotImplemented else found

        def detail() -> tuple[Path, str]:
            return path, (note and f"{note}: ") + kind.note(chain, names, rows)

        return Decision(run, path, "", detail, self)

    def example(self, rows: int | None, block: RowAdapters | None) -> None:
        return None

    def workspace_bytes(self) -> int:
        """Bytes of one dequantised expert."""
        return decorated.workspace_bytes(chain_of(self).base)


def _of_others(layer: Any, chain: Chain, call: Call, path: Path, reason: str) -> Decision:
    """The decision for PEFT's own forward; for rows the module alone, or an error."""
    _, rows, args, kwargs = call

    def run(x: Any) -> Any:
        experts.refuse_pefts_forward(chain)
        return layer.pefts_forward(x, *args, **kwargs)

    if rows is None:
        return Decision(run, path, reason)
    if path == Path.BASE:
        return Decision(lambda x: chain.base(x, *args, **kwargs), Path.BASE, NONE_OF_ROWS)
    why = f"each row its own adapter, which PEFT refuses: {reason}"
    return Decision(lambda _: _refuse(chain, rows, reason), Path.PEFT, why)


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
