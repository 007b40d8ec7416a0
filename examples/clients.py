"""Asks server.py as twelve clients at once, replaces an adapter while it runs, and asks again."""

import asyncio
from tempfile import mkdtemp

import aiohttp
import torch
from aiohttp import web
from peft import LoraConfig, get_peft_model
from server import Server
from transformers import LlamaConfig, LlamaForCausalLM

NAMES = ["anna", "ben", "cleo", "dan"]


def base_model():
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=2, **shape))
    model.generation_config.pad_token_id = 0
    return model


def folder_of(seed):
    """Of an adapter as PEFT writes it, with random values."""
    config = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base_model(), config)
    for number, factor in enumerate(p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(factor, generator=torch.Generator().manual_seed(seed + number))
    model.save_pretrained(folder := mkdtemp())
    return folder


async def main():
    runner = web.AppRunner(await (server := Server(base_model())).app())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client:

        async def ask(name):
            words = {"adapter": name, "prompt": [5, 6, 7], "count": 6}
            return await (await client.post("/generate", json=words)).json()

        async def put(name, seed):
            folder = {"folder": folder_of(seed)}
            print("adapters:", await (await client.put(f"/adapters/{name}", json=folder)).json())

        for seed, name in enumerate(NAMES):
            await put(name, 100 * seed)
        for seed in (1000, 2000):
            answers = await asyncio.gather(*map(ask, 3 * NAMES))
            print(*zip(NAMES, answers[:4], strict=True), sep="\n")
            await put("ben", seed)
    server.worker.cancel()
    await runner.cleanup()


asyncio.run(main())
