"""Which layers of a model get an adapter, and which one: a LoraConfig, ours or PEFT's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeAlias

from ..nn.adapter_spec import AdapterSpec, check_alpha, check_rank, expect
from .patterns import matches

if TYPE_CHECKING:
    import peft

AnyConfig: TypeAlias = "LoraConfig | peft.LoraConfig"

BIASES = ("none", "all", "lora_only")
ALL_LINEAR = "all-linear"
# The layer of a module, as PEFT finds it for layers_to_transform.
_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")


@dataclass(frozen=True)
class LoraConfig:
    """Which layers of a model get an adapter, and which one, in the words of PEFT's LoraConfig.

    PEFT's own object is taken, too, wherever this is; this one needs no PEFT. Fields of PEFT's that
    are not here belong to what these layers do not have, such as DoRA.

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
        layers_to_transform: the layers whose modules get an adapter, by the first number in their
            path; none is all.
        target_parameters: more of target_modules, for those that name a parameter.

    Raises:
        ValueError: a value is out of its range.
    """

    target_modules: str | Sequence[str] = ()
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
    layers_to_transform: int | Sequence[int] = ()
    target_parameters: InitVar[str | Sequence[str]] = ()

    def __post_init__(self, target_parameters: str | Sequence[str]) -> None:
        words: dict[str, Any] = {
            name: _as_patterns(getattr(self, name), name)
            for name in ("target_modules", "exclude_modules", "modules_to_save")
        }
        words["target_modules"] += _as_patterns(target_parameters, "target_parameters")
        layers = self.layers_to_transform
        words["layers_to_transform"] = (layers,) if isinstance(layers, int) else tuple(layers or ())
        words |= {name: getattr(self, name) or {} for name in ("rank_pattern", "alpha_pattern")}
        for name, value in words.items():
            object.__setattr__(self, name, value)
        where = "LoraConfig"
        expect(bool(self.target_modules), where, "at least one pattern in target_modules", ())
        expect(self.bias in BIASES, where, f"bias to be one of {BIASES}", self.bias)
        for pattern, rank in self.rank_pattern.items():
            check_rank(rank, f"{where}.rank_pattern[{pattern!r}]")
        for pattern, alpha in self.alpha_pattern.items():
            check_alpha(alpha, f"{where}.alpha_pattern[{pattern!r}]")
        self.spec_for("")  # the checks of AdapterSpec

    def spec_for(self, path: str) -> AdapterSpec:
        """The adapter of the module at `path`, by rank_pattern and alpha_pattern."""
        words = {each.name: getattr(self, each.name) for each in fields(AdapterSpec)}
        words["r"] = _first_match(self.rank_pattern, path, self.r)
        words["lora_alpha"] = _first_match(self.alpha_pattern, path, self.lora_alpha)
        return AdapterSpec(**words)

    def is_in_layers(self, path: str) -> bool:
        """Whether layers_to_transform leaves in the module at `path`."""
        layer = _LAYER.match(path)
        wanted: Any = self.layers_to_transform
        return not wanted or (layer is not None and int(layer[1]) in wanted)


def as_config(given: Any, prefix: str = "", others: str = "") -> LoraConfig:
    """The config itself, or PEFT's as one of ours that means the same. TypeError, with `prefix` and
    what else may be passed, if it is neither; ValueError if PEFT's asks for something that these
    layers do not have: the message names it."""
    kind: Any = type(given)
    if isinstance(given, LoraConfig):
        return given
    if kind.__name__ != "LoraConfig" or not kind.__module__.startswith("peft."):
        expected = f"PEFT's or lora_ext's LoraConfig{others}"
        raise TypeError(f"{prefix}expected {expected}, but got {kind.__name__}")
    plain = vars(kind())
    words = {name: value for name, value in vars(given).items() if value != plain.get(name)}
    ours = set(LoraConfig.__dataclass_fields__)
    information = {each.name for each in fields(kind.__base__)} - {"inference_mode"}
    known = ours | information | {"fan_in_fan_out"}
    # PEFT itself adds the heads of the other tasks to modules_to_save.
    if not (given.modules_to_save or str(given.task_type).endswith(("_LM", "_EXTRACTION", "None"))):
        known -= {"task_type"}
    unknown = [f"{name}={value!r}" for name, value in words.items() if name not in known]
    if unknown:
        raise ValueError(
            f"{prefix}expected a LoraConfig without what lora_ext's own layers lack, but got "
            f"{', '.join(unknown)}; "
            "lora_ext.accelerate(peft.get_peft_model(model, config)) takes it"
        )
    for name in ("target_modules", "exclude_modules"):
        names = words.get(name)
        if isinstance(names, str) and names != ALL_LINEAR:
            words[name] = f"re:{names}"
    for name in ("rank_pattern", "alpha_pattern"):
        table = (words.get(name) or {}).items()
        words[name] = {rf"re:(.*\.)?({key})": value for key, value in table}
    return LoraConfig(**{name: value for name, value in words.items() if name in ours})


def _as_patterns(given: Any, name: str) -> tuple[str, ...]:
    several = isinstance(given, Iterable) and not isinstance(given, str)
    patterns: tuple[Any, ...] = tuple(given) if several else (given,) * (given is not None)
    patterns = tuple(sorted(patterns)) if isinstance(given, set) else patterns
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
