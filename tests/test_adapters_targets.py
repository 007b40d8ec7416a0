"""Which modules a config means, compared with PEFT's own function on random configs and paths."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_ext.adapters.peft_config import AdapterConfig
from lora_ext.adapters.targets import (
    base_modules,
    chosen_paths,
    saved_paths,
    targeted_paths,
)
from lora_ext.patterns.automaton import Budget

PART = st.sampled_from(["a", "b", "q_proj", "layers", "h", "0", "1", "12"])
PATH = st.lists(PART, min_size=1, max_size=6).map(".".join)
NAMES = st.lists(st.one_of(PART, PATH), min_size=1, max_size=4).map(tuple)
EXPRESSION = st.sampled_from(
    [r".*\.q_proj", r"(.*\.)?[ab](\.\d+)+", r"layers\.\d\..*", "a|b", r".*layers\.(0|12).*", ".*"]
)


def budget() -> Budget:
    return Budget("a test", 10_000_000)


@settings(deadline=None, max_examples=250)
@given(
    path=PATH,
    targets=st.one_of(NAMES, EXPRESSION),
    excluded=st.one_of(NAMES, EXPRESSION, st.just(())),
    layers=st.one_of(st.none(), st.sets(st.sampled_from([0, 1, 12, 5]), min_size=1)),
    layers_pattern=st.sampled_from([(), ("layers",), ("h", "a.layers")]),
    saved=st.one_of(st.just(()), NAMES),
)
def test_targets_are_those_of_peft(path, targets, excluded, layers, layers_pattern, saved):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    if isinstance(targets, str):
        layers, layers_pattern = None, ()
    if layers is None:
        layers_pattern = ()
    theirs = LoraConfig(
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=(excluded if isinstance(excluded, str) else list(excluded)) or None,
        layers_to_transform=None if layers is None else sorted(layers),
        layers_pattern=list(layers_pattern) or None,
        modules_to_save=list(saved) or None,
    )
    ours = AdapterConfig(
        target_modules=targets,
        exclude_modules=excluded,
        layers_to_transform=None if layers is None else frozenset(layers),
        layers_pattern=layers_pattern,
        modules_to_save=saved,
    )
    tree = nn.Module()
    parent = tree
    for part in path.split("."):
        parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    wanted = [p for p, _ in tree.named_modules() if p and check_target_module_exists(theirs, p)]
    assert targeted_paths(tree, ours, budget()) == wanted


@settings(deadline=None, max_examples=100)
@given(paths=st.sets(PATH, min_size=1, max_size=5), names=NAMES)
def test_modules_to_save_end_with_a_name(paths, names):
    tree = nn.Module()
    for path in sorted(paths):
        parent = tree
        for part in path.split("."):
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
    every = [path for path, _ in tree.named_modules() if path]
    assert saved_paths(tree, names) == [p for p in every if any(p.endswith(n) for n in names)]


def test_parts_of_layers_with_adapters_are_no_targets():
    from lora_ext import LoRAConfig, apply_lora

    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    before = list(base_modules(model))
    apply_lora(model, LoRAConfig("1.0"), adapter="x")
    assert list(base_modules(model)) == before == ["0", "1", "1.0"]
    config = AdapterConfig(target_modules="all-linear")
    assert targeted_paths(model, config, budget()) == ["0", "1.0"]
    config = AdapterConfig(target_modules=("lora_a", "lora_b", "x", "0"))
    assert targeted_paths(model, config, budget()) == ["0", "1.0"]


def test_thousands_of_names_take_one_look_up_a_path():
    names = tuple(f"model.layers.{i}.q_proj" for i in range(20_000))
    paths = [f"model.layers.{i}.{kind}_proj" for i in range(3000) for kind in "qkv"]
    config = AdapterConfig(target_modules=names, exclude_modules=names[1000:])
    assert len(chosen_paths(paths, config, budget())) == 1000


def test_the_work_of_all_patterns_is_bounded():
    """Each pattern alone is harmless; a config can have many, and a model many modules."""
    expression = "|".join("(a|a)*b" for _ in range(20))
    paths = [f"{'a' * 500}.{i}" for i in range(1000)]
    config = AdapterConfig(target_modules=expression)
    spent = Budget("the patterns", 300_000)
    with pytest.raises(ValueError, match="expected the patterns to take at most 300000 steps"):
        chosen_paths(paths, config, spent)
    assert spent.spent <= 300_500


def test_all_linear_leaves_out_the_output_and_the_head():
    class Model(nn.Module):
        def __init__(self, output):
            super().__init__()
            self.body = nn.Linear(2, 2)
            self.score = nn.Linear(2, 2)
            self.emb = nn.Embedding(2, 2)
            self.attn = nn.MultiheadAttention(2, 1)
            self.get_output_embeddings = lambda: self.score if output else None

    config = AdapterConfig(target_modules="All-Linear")
    linear = ["body", "attn.out_proj"]
    assert targeted_paths(Model(True), config, budget()) == linear
    assert targeted_paths(Model(False), config, budget()) == ["body", "score", "attn.out_proj"]
    config = AdapterConfig(target_modules="all-linear", task_type="SEQ_CLS")
    assert targeted_paths(Model(False), config, budget()) == linear
