"""Which layers of a model get an adapter, and which one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..nn.adapter_spec import AdapterSpec, check_alpha, check_rank, expect
from .patterns import matches

BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True)
class LoraConfig:
    """Which layers of a model get an adapter, and which one.

    A module is named by its dotted path in the model, such as ``"layers.0.attn.q_proj"``. Patterns
    are of three forms (`lora_ext.models.patterns`): a name, which is the path or its end at a dot
    (``"q_proj"``, ``"attn.q_proj"``); a glob, if it holds any of ``*?[`` (``"*_proj"``); and
    ``"re:..."``, a regular expression for the whole path.

    Attributes:
        target_modules: one pattern or several; ``"all-linear"`` is every linear layer (nn.Linear,
            transformers' Conv1D and quantised ones) and the experts of mixtures, except the output
            embedding, Mamba's ``out_proj`` and the modules that modules_to_save names. Experts can
            also be selected by their module (``"experts"``), and one of their parameters, or a
            router, by its name (``"experts.down_proj"``, ``"mlp.gate"``).
        r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, lora_bias: as in `AdapterSpec`.
        exclude_modules: patterns of modules that get none.
        rank_pattern: pattern -> r where it differs; the first match counts.
        alpha_pattern: pattern -> alpha where it differs.
        bias: which biases of the base are trained: "none", "all", or "lora_only", those of layers
            with an adapter.
        modules_to_save: patterns of modules that are trained whole and saved with the adapter, such
            as a new classification head.
        adapter_dtype: of lora_a and lora_b; None is float32 on a half base, else the base's dtype.

    Raises:
        ValueError: a value is out of its range.
    """

    target_modules: str | Sequence[str]
    r: int = 8
    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    lora_bias: bool = False
    exclude_modules: str | Sequence[str] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    bias: str = "none"
    modules_to_save: str | Sequence[str] = ()
    adapter_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            object.__setattr__(self, name, _as_patterns(getattr(self, name), name))
        expect(
            bool(self.target_modules), "LoraConfig", "at least one pattern in target_modules", ()
        )
        expect(self.bias in BIASES, "LoraConfig", f"bias to be one of {BIASES}", self.bias)
        for pattern, rank in self.rank_pattern.items():
            check_rank(rank, f"LoraConfig.rank_pattern[{pattern!r}]")
        for pattern, alpha in self.alpha_pattern.items():
            check_alpha(alpha, f"LoraConfig.alpha_pattern[{pattern!r}]")
        if self.adapter_dtype is not None:
            expect(
                isinstance(self.adapter_dtype, torch.dtype)
                and self.adapter_dtype.is_floating_point,
                "LoraConfig",
                "adapter_dtype to be a floating torch.dtype",
                self.adapter_dtype,
            )
        self.spec_for("")  # the checks of AdapterSpec

    def spec_for(self, path: str) -> AdapterSpec:
        """The adapter of the module at `path`, by rank_pattern and alpha_pattern."""
        return AdapterSpec(
            r=_first_match(self.rank_pattern, path, self.r),
            lora_alpha=_first_match(self.alpha_pattern, path, self.lora_alpha),
            lora_dropout=self.lora_dropout,
            use_rslora=self.use_rslora,
            init_lora_weights=self.init_lora_weights,
            lora_bias=self.lora_bias,
        )


def not_a_config(given: object) -> str:
    """What was passed instead, for a message. PEFT's class name differs only in letter case."""
    name = type(given).__name__
    if not type(given).__module__.startswith("peft."):
        return name
    return (
        f"peft's {name}: lora_ext.accelerate(peft.get_peft_model(model, config)) takes that, and "
        "lora_ext.LoraConfig is what is meant here"
    )


def _as_patterns(given: Any, name: str) -> tuple[str, ...]:
    several = isinstance(given, Iterable) and not isinstance(given, str)
    patterns: tuple[Any, ...] = tuple(given) if several else (given,)
    expect(
        all(isinstance(pattern, str) and pattern for pattern in patterns),
        "LoraConfig",
        f"{name} to be a pattern or a sequence of patterns",
        given,
    )
    for pattern in patterns:
        matches(pattern, "")  # a pattern that is not valid raises here, before a model is touched
    return patterns


def _first_match(table: Mapping[str, Any], path: str, default: Any) -> Any:
    return next((value for pattern, value in table.items() if matches(pattern, path)), default)
