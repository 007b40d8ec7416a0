"""apply_lora on mixtures whose experts are in bitsandbytes' 4 bits or in torchao's tensors: the
model's verbs and files."""

import copy
import dataclasses

import peft
import pytest
import torch
from four_bit_experts import parts_of
from helpers import BF16, F32
from layer_helpers import bits
from mixture_helpers import logits, mixture, randomized, some_ids
from quantised_experts import FOUR_BITS, forms, quantise_both
from torch import nn

import lora_ext
from lora_ext import LoraConfig, apply_lora
from lora_ext.adapters.__main__ import convert
from lora_ext.nn import LoRAExperts

SIZES = {"hidden_size": 64, "moe_intermediate_size": 96, "intermediate_size": 96}
TYPES = {"qwen3_moe": SIZES, "gpt_oss": SIZES}
FORMS = forms("stand-in", "int8", "float8 groups")
each_library = pytest.mark.parametrize("form", FORMS[len(FOUR_BITS) - 1 :])  # and one in 4 bits


def experts_of(model):
    return [module for path, module in model.named_modules() if path.endswith("mlp.experts")]


def two_models(kind="qwen3_moe", form="nf4", dtype=F32):
    """(a model with experts in 4 bits, the same model dense)."""
    packed = mixture(kind, dtype, **TYPES[kind])
    dense = copy.deepcopy(packed)
    for module, other in zip(experts_of(packed), experts_of(dense), strict=True):
        quantise_both(module, other, form)
    return packed, dense


def adapted(models, *targets, **words):
    """With the same random adapters: their order in the models differs."""
    config = LoraConfig(targets or ["all-linear"], r=3, lora_alpha=6, **words)
    first, *others = [randomized(apply_lora(model, config)) for model in models]
    for other in others:
        other.load_state_dict(lora_ext.models.lora_state_dict(first), strict=False)
    return [first, *others]


def calls(model):
    return sum(part.calls for part in parts_of(model))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", TYPES)
def test_the_bits_of_dense_experts(kind, form):
    models = adapted(two_models(kind, form), lora_dropout=0.2)
    found = []
    for model in models:
        torch.manual_seed(2)
        y = logits(model.train())
        y.square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if "lora_" in n} | {"y": y})
    packed, dense = found
    assert all(torch.equal(packed[name], value) for name, value in dense.items())
    assert packed.keys() == dense.keys() and calls(models[0]) == 0
    paths = {(each.kind, each.path) for each in lora_ext.explain(models[0])}
    assert ("LoRAParameter", "fused") in paths
    assert ", one dequantised at a time" in str(lora_ext.explain(models[0]))
    assert all("lora_" in name for name, p in models[0].named_parameters() if p.requires_grad)


def test_generation():
    packed, dense = adapted(two_models(dtype=BF16))
    found = [
        model.generate(some_ids(shape=(1, 5)), max_new_tokens=4, do_sample=False)
        for model in (packed, dense)
    ]
    assert torch.equal(*found) and calls(packed) == 0


def test_adapters_that_are_off_or_of_none():
    packed, dense = adapted(two_models())
    with lora_ext.disable_adapter(packed), lora_ext.disable_adapter(dense):
        torch.testing.assert_close(logits(packed), logits(dense))
    lora_ext.set_adapter(packed, [])
    lora_ext.set_adapter(dense, [])
    torch.testing.assert_close(logits(packed), logits(dense))
    assert calls(packed) == 0


@each_library
def test_merging_is_refused(form):
    packed, _ = adapted(two_models(form=form), "experts")
    before = logits(packed)
    for verb in (lora_ext.merge_adapter, lora_ext.merge_and_unload):
        with pytest.raises(RuntimeError, match=r"dense '.*_proj' to merge into, but it is"):
            verb(packed)
    assert torch.equal(logits(packed), before)


@each_library
def test_taking_out_and_copies(form):
    packed, _ = two_models(form=form)
    plain, keys, kinds = (
        logits(packed),
        list(packed.state_dict()),
        [type(m) for m in packed.modules()],
    )
    before = copy.deepcopy(packed.state_dict())
    adapted([packed])
    twin = copy.deepcopy(packed)
    assert torch.equal(logits(twin), logits(packed))
    after = packed.state_dict()
    assert [key for key in after if ".lora" not in key] == keys
    for name, value in before.items():
        assert torch.equal(bits(after[name]), bits(value)), name
    lora_ext.unload(packed)
    assert [type(m) for m in packed.modules()] == kinds and list(packed.state_dict()) == keys
    assert torch.equal(logits(packed), plain)


@each_library
def test_counts(form):
    packed, dense = adapted(two_models(form=form))
    found, wanted = map(lora_ext.models.trainable_parameters, (packed, dense))
    assert dataclasses.astuple(found) == dataclasses.astuple(wanted)
    assert lora_ext.explain(packed).workspace_bytes == 2 * 96 * 64 * 4


@pytest.mark.parametrize("form", ["nf4", "stand-in"])
def test_another_forward_dequantises_all(form):
    """Where the experts cannot be computed here, by the library's own function."""
    packed, dense = adapted(two_models(form=form), "experts")
    for model in (packed, dense):
        for module in model.modules():
            if isinstance(module, LoRAExperts):
                module._is_expert_parallel = True
    torch.testing.assert_close(logits(packed), logits(dense))
    assert calls(packed) == (4 if form == "nf4" else 0)
    assert "the experts are split over processes" in str(lora_ext.explain(packed))


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda e: nn.utils.parametrize.register_parametrization(
                e, "down_proj", Doubled(), unsafe=True
            ),
            "some are computed; leave the module out by exclude_modules",
        ),
        (
            lambda e: setattr(e.parametrizations["down_proj"][0].quant_state, "blocksize", 4096),
            "of 'down_proj': experts of 64 x 96 do not begin with a block of 4096 codes each; excl",
        ),
    ],
)
def test_experts_that_cannot_have_adapters_are_refused(change, message):
    model, _ = two_models()
    change(experts_of(model)[0])
    with pytest.raises(ValueError, match=message):
        apply_lora(model, LoraConfig("all-linear"))
    apply_lora(model, LoraConfig("all-linear", exclude_modules=["experts"]))


# ---- files ----


@pytest.mark.parametrize("into", [0, 1], ids=["packed", "dense"])
@pytest.mark.parametrize("source", [0, 1], ids=["packed", "dense"])
@each_library
def test_files_from_one_into_the_other(form, source, into, tmp_path):
    """PEFT wraps the parameters of experts in 4 bits in another order than those of dense ones."""
    models = adapted(two_models(form=form))
    lora_ext.save_adapter(models[source], tmp_path)
    other = two_models(form=form)[into]
    lora_ext.load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(models[into]))


@pytest.mark.parametrize("place", [0, 1], ids=["packed", "dense"])
@each_library
def test_peft_reads_our_files_and_we_read_its(form, place, tmp_path):
    base, plain = two_models(form=form)[place], two_models(form=form)[place]
    (model,) = adapted([base], "experts")
    lora_ext.save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "ours")
    lora_ext.accelerate(theirs)
    assert torch.equal(logits(theirs), logits(model))
    theirs.save_pretrained(tmp_path / "theirs")
    again = two_models(form=form)[place]
    lora_ext.load_adapter(again, tmp_path / "theirs")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("layout", ["per-expert", "peft"])
def test_peft_reads_on_a_dense_base_what_was_trained_on_four_bits(layout, tmp_path):
    """A folder in PEFT's order of dense experts is converted from that of quantised ones."""
    model, dense = two_models()
    (model,) = adapted([model], "experts")
    dense.config.save_pretrained(tmp_path / "base")
    words = {"base_model_name_or_path": str(tmp_path / "base")}
    first = tmp_path / "first"
    lora_ext.save_adapter(model, first, layout=layout, **words)
    if layout == "peft":
        with pytest.raises(RuntimeError, match="size mismatch"):
            peft.PeftModel.from_pretrained(two_models()[1], first)
        convert(str(first), str(tmp_path / "second"), layout)
        first = tmp_path / "second"
    theirs = lora_ext.accelerate(peft.PeftModel.from_pretrained(dense, first))
    assert torch.equal(logits(theirs), logits(model))


def test_an_adapter_for_each_sample():
    models = two_models()
    for name, rank in (("fr", 3), ("de", 2)):
        for model in models:
            apply_lora(model, LoraConfig("experts", r=rank, lora_alpha=6), name)
    packed, dense = models
    dense.load_state_dict(lora_ext.models.lora_state_dict(randomized(packed)), strict=False)
    for names in (["fr", "de"], [None, "de"], [None, None]):
        found = []
        for model in models:
            with lora_ext.use_adapters(model, names):
                found.append(logits(model))
        torch.testing.assert_close(*found)
    assert calls(packed) == 0
