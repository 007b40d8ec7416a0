"""`use_adapters` around generation by a language model, with a KV cache, beams and activated LoRA:
every sample has the tokens that it has alone."""

import pytest
import torch
from layer_helpers import randomize as randomize_ours
from peft import LoraConfig, get_peft_model
from peft_helpers import randomize as randomize_pefts
from peft_helpers import tiny_llama

import lora_ext

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj", "embed_tokens"]
RANKS = {"a": 2, "b": 4, "c": 3}
NAMES = ["a", None, "c", "b"]


def llama():
    return tiny_llama(pad_token_id=0, eos_token_id=None, bos_token_id=None)


def ours():
    model = llama()
    for name, rank in RANKS.items():
        lora_ext.apply_lora(model, lora_ext.LoraConfig(TARGETS, r=rank, lora_alpha=2 * rank), name)
    return randomize_ours(model).eval()


def accelerated():
    configs = {
        n: LoraConfig(r=r, lora_alpha=2 * r, target_modules=TARGETS) for n, r in RANKS.items()
    }
    model = get_peft_model(llama(), configs["a"], "a")
    for name in ("b", "c"):
        model.add_adapter(name, configs[name])
    return randomize_pefts(lora_ext.accelerate(model)).eval()


@pytest.fixture(params=[ours, accelerated], ids=["ours", "peft"])
def model(request):
    return request.param()


def prompts(rows=4, tokens=6):
    return torch.randint(1, 48, (rows, tokens), generator=torch.Generator().manual_seed(6))


def generated(model, names, ids, index=None, **words):
    words = {"max_new_tokens": 8, "do_sample": False, **words}
    repeats = max(words.get("num_beams", 1), words.get("num_return_sequences", 1))
    with lora_ext.use_adapters(model, names, index, repeats=repeats):
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **words)


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
    ],
    ids=["greedy", "greedy without a cache", "beams", "sequences of beams"],
)
def test_the_tokens_of_each_sample_alone(model, words):
    ids = prompts()
    together = generated(model, NAMES, ids, **words)
    each = [generated(model, [n], one, **words) for n, one in zip(NAMES, ids.split(1), strict=True)]
    assert torch.equal(together, torch.cat(each))
    same = generated(model, ["a"] * 4, ids, **words)
    assert not torch.equal(same, together)


def test_activated_lora_leaves_the_tokens_before_it_as_they_are(model):
    """-1 before the invocation: the base alone there, so that a cache of the base can be used."""
    ids = prompts(tokens=10)
    starts = torch.tensor([0, 3, 7, 10])
    index = torch.where(torch.arange(10) >= starts[:, None], torch.arange(4)[:, None] % 3, -1).int()
    names = ["a", "b", "c"]
    with torch.no_grad():
        with lora_ext.use_adapters(model, [None] * 4):
            base = model(input_ids=ids, use_cache=True)
        with lora_ext.use_adapters(model, names, index):
            y = model(input_ids=ids).logits
        with lora_ext.use_adapters(model, ["a", "b", "c", None]):
            whole = model(input_ids=ids).logits
    for sample, start in enumerate(starts.tolist()):
        torch.testing.assert_close(y[sample, :start], base.logits[sample, :start])
        assert (y[sample, start:] != base.logits[sample, start:]).all(1).all() or start == 10
    torch.testing.assert_close(y[0], whole[0])
    # The rest on the base's cache.
    cache = base.past_key_values
    cache.crop(-7)
    with torch.no_grad(), lora_ext.use_adapters(model, names, index[:, 3:]):
        rest = model(input_ids=ids[:, 3:], past_key_values=cache).logits
    torch.testing.assert_close(rest[1], y[1, 3:], rtol=1e-4, atol=1e-5)


def test_activated_lora_generates_with_the_last_of_the_index(model):
    ids = prompts(2)
    index = torch.tensor([[-1, -1, -1, 0, 0, 0], [-1] * 6], dtype=torch.int32)
    together = generated(model, ["b"], ids, index)
    tokens = ids
    with torch.no_grad():
        for step in range(8):
            grown = torch.cat([index, index[:, -1:].expand(-1, step)], 1)
            with lora_ext.use_adapters(model, ["b"], grown):
                logits = model(input_ids=tokens, use_cache=False).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(together, tokens)
