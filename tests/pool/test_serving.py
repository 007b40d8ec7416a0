"""The page about servers: its code under load, with more tenants than slots.

Every answer is that of the tenant's adapter alone, in float32 and greedy, or an error with a name.
"""

import asyncio
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft_helpers import tiny_llama

import lora_ext
from lora_ext import AdapterPool, LoraConfig

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
TENANTS = [f"tenant{i}" for i in range(8)]
CLIENTS, CAPACITY, COUNT = 24, 3, 5
# Of an answer's logits between the first and the second: rounding differs with the batch by 1e-5.
GAP = 1e-3


@pytest.fixture(scope="module")
def page():
    """What the page's first and last block define."""
    first, *_, last = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    names = {}
    for block in (first, last):
        exec(compile(block, PAGE.name, "exec"), names)
    return names


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of all tenants, and one that is broken."""
    folder = tmp_path_factory.mktemp("adapters")
    pool = AdapterPool(tiny_llama(), len(TENANTS), 8)
    generator = torch.Generator().manual_seed(3)
    for place, name in enumerate(TENANTS):
        targets = ["q_proj", "v_proj", "down_proj"][: 1 + place % 3]
        for parameter in pool.add_adapter(
            name, LoraConfig(targets, r=2 + place % 4, lora_alpha=16)
        ):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        pool.save_adapter(name, folder / name)
    (folder / "broken").mkdir()
    return {name: folder / name for name in (*TENANTS, "broken")}


@pytest.fixture(scope="module")
def alone(folders):
    """{(tenant, prompt): tokens} of a model with one adapter, one request at a time."""
    generator = torch.Generator().manual_seed(4)
    lengths = [2, 5, 3, 7, 4, 6] * 3
    prompts = [tuple(torch.randint(3, 48, (n,), generator=generator).tolist()) for n in lengths]
    found = {}
    for name in TENANTS:
        model = lora_ext.load_adapter(tiny_llama(), folders[name], name).eval()
        for prompt in prompts:
            tokens = greedy(model, prompt)
            if tokens is not None:
                found[name, prompt] = tokens
    differing = [{tokens for (_, p), tokens in found.items() if p == prompt} for prompt in prompts]
    assert len(found) > 100 and sum(len(tokens) == len(TENANTS) for tokens in differing) > 3
    return found


@torch.no_grad()
def greedy(model, prompt):
    """An answer, up to the token that ends it; None where rounding might change it."""
    ids, tokens = torch.tensor([prompt]), []
    while len(tokens) < COUNT and model.generation_config.eos_token_id not in tokens:
        logits, best = model(input_ids=ids).logits[0, -1].topk(2)
        if logits[0] - logits[1] < GAP:
            return None
        tokens.append(int(best[0]))
        ids = torch.cat([ids, torch.tensor([tokens[-1:]])], 1)
    return tuple(tokens)


async def load(stream, alone, count):
    """Clients that ask one after the other, some of whom leave after a token.

    Returns:
        How many answers were right, cut short and wrong, and the errors by their text.
    """
    rng, left, outcomes = random.Random(5), iter(range(count)), Counter()
    asked = list(alone)

    async def client():
        for number in left:
            tenant, prompt = rng.choice(asked)
            tenant = {17: "broken", 43: "nobody"}.get(number % 50, tenant)
            leaves, tokens = number % 7 == 0, []
            streaming = stream(tenant, list(prompt), COUNT)
            try:
                async for token in streaming:
                    tokens.append(token)
                    if leaves:
                        break
            except (LookupError, RuntimeError, ValueError) as error:
                outcomes[f"{type(error).__name__}: {error}"] += 1
                continue
            finally:
                await streaming.aclose()
            wanted = alone[tenant, prompt]
            right = tuple(tokens) == (wanted[:1] if leaves else wanted)
            outcomes["cut" if leaves and right else "right" if right else "wrong"] += 1

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return outcomes


def counted(pool):
    """The names that leave the pool, as they do."""
    removed, remove = [], pool.delete_adapter

    def counting(name):
        removed.append(name)
        remove(name)

    pool.delete_adapter = counting
    return removed


def counts(nightly):
    many = pytest.param(nightly, marks=[pytest.mark.nightly])
    return pytest.mark.parametrize("count", [150, many], ids=str)


@counts(10_000)
def test_every_answer_is_that_of_its_adapter_alone(page, folders, alone, count):
    """By the page's server, in batches, where tenants give up their slots all the time."""

    async def served():
        server = page["Server"](tiny_llama(), folders, CAPACITY)
        removed = counted(server.pool)
        worker = asyncio.create_task(server.run())
        outcomes = await load(server.stream, alone, count)
        worker.cancel()
        return outcomes, removed

    outcomes, removed = asyncio.run(served())
    assert len(removed) > count / 5 and set(removed) == set(TENANTS)
    answers = {name: outcomes.pop(name) for name in ("right", "cut")}
    errors = dict(outcomes)
    assert sum(answers.values()) == count - 2 * (count // 50) and answers["cut"] > count / 10
    assert sorted(errors.values()) == [count // 50] * 2
    assert any("there is no tenant 'nobody'" in text for text in errors)
    assert any("broken" in text and "adapter_config.json" in text for text in errors)


@counts(3_000)
def test_a_block_for_each_request(page, folders, alone, count):
    """Tasks whose blocks overlap, and others who take their slots away: an answer is right, or says
    that its adapter was removed."""
    model = tiny_llama().eval()
    pool = AdapterPool(model, CAPACITY, max_rank=8)

    async def stream(tenant, prompt, tokens):
        if tenant not in pool:
            if len(pool) == CAPACITY:
                pool.delete_adapter(pool.names[0])
            pool.add_adapter(tenant, folders[tenant])
        async for token in page["stream"](model, tenant, prompt, tokens):
            yield token

    outcomes = asyncio.run(load(stream, alone, count))
    assert outcomes["wrong"] == 0 and outcomes["right"] + outcomes["cut"] > count / 20
    errors = {text: n for text, n in outcomes.items() if text not in ("right", "cut", "wrong")}
    lost = {text: n for text, n in errors.items() if "was removed since" in text}
    assert sum(lost.values()) > count / 10
    rest = [text for text in errors if text not in lost]
    assert all("broken" in text or "nobody" in text for text in rest)
