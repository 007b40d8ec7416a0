"""An HTTP server of many adapters on one model; clients.py starts it and asks."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import torch
from aiohttp import web
from torch.nn.utils.rnn import pad_sequence

import lora_ext


class Server:
    def __init__(self, model, capacity=64, max_rank=16):
        self.model, self.waiting = model.eval(), asyncio.Queue()
        self.pool = lora_ext.AdapterPool(model, capacity, max_rank)
        self.thread = ThreadPoolExecutor(1)  # which alone uses the model and the pool

    async def app(self):
        routes = [web.post("/generate", self.generate), web.put("/adapters/{name}", self.put)]
        self.worker = asyncio.create_task(self.answer_batches())
        (app := web.Application()).add_routes(routes)
        return app

    def run(self, *call):
        return asyncio.get_running_loop().run_in_executor(self.thread, *call)

    async def put(self, request):  # {"folder": FOLDER}: adds or replaces one
        name, folder = request.match_info["name"], (await request.json())["folder"]
        change = self.pool.replace_adapter if name in self.pool else self.pool.add_adapter
        try:
            await self.run(change, name, folder)
        except (OSError, ValueError) as error:  # a folder that is broken or does not fit
            raise web.HTTPBadRequest(text=str(error)) from error
        return web.json_response(sorted(self.pool))

    async def generate(self, request):  # {"adapter": NAME, "prompt": [token, ...], "count": N}
        asked, tokens = await request.json(), asyncio.Future()
        if asked["adapter"] not in self.pool:
            raise web.HTTPNotFound(text=f"expected one of {sorted(self.pool)}")
        self.waiting.put_nowait((asked, tokens))
        return web.json_response(await tokens)

    async def answer_batches(self):
        while batch := [await self.waiting.get()]:
            while len(batch) < 16 and not self.waiting.empty():
                batch.append(self.waiting.get_nowait())
            call = self.run(self.batch_answers, [asked for asked, _ in batch])
            [found] = await asyncio.gather(call, return_exceptions=True)
            answers = len(batch) * ["error"] if isinstance(found, Exception) else found
            for (asked, future), tokens in zip(batch, answers, strict=True):
                future.done() or future.set_result(tokens[: asked["count"]])  # done: it has left

    def batch_answers(self, batch):
        prompts = [torch.tensor(asked["prompt"]) for asked in batch]
        ids = pad_sequence(prompts, batch_first=True, padding_value=-1, padding_side="left")
        words = {"attention_mask": ids >= 0, "max_new_tokens": max(one["count"] for one in batch)}
        with lora_ext.use_adapters(self.model, [asked["adapter"] for asked in batch]):
            found = self.model.generate(ids.clamp(0), do_sample=False, **words)
        return found[:, ids.shape[1] :].tolist()
