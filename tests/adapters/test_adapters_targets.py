"""Which modules a config's names mean, compared with PEFT's own function on random paths."""

from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_ext.adapters.targets import base_modules, saved_paths, selected_paths

PART = st.sampled_from(["a", "b", "q_proj", "layers", "h", "0", "1", "12"])
PATH = st.lists(PART, min_size=1, max_size=6).map(".".join)
NAMES = st.lists(st.one_of(PART, PATH), min_size=1, max_size=4).map(tuple)


def tree_of(paths):
    tree = nn.Module()
    for path in sorted(paths):
        parent = tree
        for part in path.split("."):
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
    return tree


@settings(deadline=None, max_examples=250)
@given(
    path=PATH,
    targets=st.one_of(NAMES, st.sampled_from([r"a|layers\.0\.b", r"q_proj"])),
    excluded=st.one_of(NAMES, st.just(())),
    saved=st.one_of(st.just(()), NAMES),
)
def test_names_select_what_they_select_in_peft(path, targets, excluded, saved):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    theirs = LoraConfig(
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=list(excluded) or None,
        modules_to_save=list(saved) or None,
    )
    tree = tree_of([path])
    wanted = [p for p, _ in tree.named_modules() if p and check_target_module_exists(theirs, p)]
    assert selected_paths(tree, targets, excluded, saved) == wanted


@settings(deadline=None, max_examples=100)
@given(paths=st.sets(PATH, min_size=1, max_size=5), names=NAMES)
def test_modules_to_save_end_with_a_name(paths, names):
    tree = tree_of(paths)
    every = [path for path, _ in tree.named_modules() if path]
    assert saved_paths(tree, names) == [p for p in every if any(p.endswith(n) for n in names)]


def test_parts_of_layers_with_adapters_are_no_targets():
    from lora_ext import LoraConfig, apply_lora

    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    before = list(base_modules(model))
    apply_lora(model, LoraConfig("1.0"), adapter_name="x")
    assert list(base_modules(model)) == before == ["0", "1", "1.0"]
    assert selected_paths(model, ("lora_a", "lora_b", "x", "0"), (), ()) == ["0", "1.0"]


def test_thousands_of_names_take_one_look_up_a_path():
    names = tuple(f"model.layers.{i}.q_proj" for i in range(20_000))
    tree = tree_of([f"model.layers.{i}.{kind}_proj" for i in range(1200) for kind in "qk"])
    assert len(selected_paths(tree, names, names[1000:], ())) == 1000
