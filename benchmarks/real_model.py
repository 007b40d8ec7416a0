"""Real weights and real activations: layers of MiniLM-L6 reading English sentences.

The sentences are docstrings of Python's standard library.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from . import minilm
from .agreement import error_of, outputs
from .problem import Problem
from .sentences import sentences_of
from .shapes import DROPOUT, FORWARD, STEP, Cell
from .variants import BUILDERS

ROWS = 2048  # tokens in one input
COPIES = 3  # inputs, from different sentences
# Path in the model, K, N.
LAYERS = {
    "MiniLM attention.query": ("encoder.layer.0.attention.self.query", 384, 384),
    "MiniLM intermediate": ("encoder.layer.0.intermediate.dense", 384, 1536),
}
_MODULES = ("argparse", "decimal", "difflib", "email.message", "fractions", "heapq", "http.client")
_MODULES += ("ipaddress", "logging", "os", "pathlib", "random", "shutil", "socket", "statistics")
_MODULES += ("string", "subprocess", "tarfile", "textwrap", "threading", "unittest.mock")
_MODULES += ("builtins", "collections", "functools", "itertools", "math", "tempfile", "zipfile")
_BATCH = 64  # sentences per model call


def real_cells() -> list[Cell]:
    """Both layers, forward and step, in both dtypes."""
    return [
        Cell(mode, dtype, ROWS, *shape, layer=layer, group="real", dropout_p=p)
        for layer, (_, *shape) in LAYERS.items()
        for dtype in ("float32", "bfloat16")
        for mode, p in ((FORWARD, 0.0), (STEP, DROPOUT))
    ]


def sentences() -> Iterator[str]:
    """Different English sentences from docstrings of the standard library."""
    seen: set[str] = set()
    for module_name in _MODULES:
        module = importlib.import_module(module_name)
        members = [module, *(m for _, m in inspect.getmembers(module))]
        for member in list(members):
            if inspect.isclass(member):
                members += [m for _, m in inspect.getmembers(member, inspect.isroutine)]
        for member in members:
            for sentence in sentences_of(inspect.getdoc(member) or ""):
                if sentence not in seen:
                    seen.add(sentence)
                    yield sentence


@cache
def _captured() -> dict[str, tuple[Tensor, Tensor, list[Tensor]]]:
    """Layer -> weight [N, K], bias [N] and inputs [ROWS, K], in float32 on the CPU."""
    tokenizer, model = minilm.tokenizer(), minilm.encoder(torch.float32).eval()
    modules = {layer: model.get_submodule(path) for layer, (path, *_) in LAYERS.items()}
    rows: dict[str, list[Tensor]] = {layer: [] for layer in LAYERS}
    mask = torch.empty(0)

    def hook_for(layer: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            rows[layer].append(arguments[0][mask].clone())  # without the padding

        return hook

    handles = [m.register_forward_pre_hook(hook_for(layer)) for layer, m in modules.items()]
    source, tokens = sentences(), 0
    while tokens < ROWS * COPIES:
        texts = [text for text, _ in zip(source, range(_BATCH), strict=False)]
        if not texts:
            raise RuntimeError("the standard library's docstrings are missing (python -OO?)")
        batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        mask = batch["attention_mask"].bool()
        tokens += int(mask.sum())
        with torch.no_grad():
            model(**batch)
    for handle in handles:
        handle.remove()
    inputs = {layer: torch.cat(parts)[: ROWS * COPIES].split(ROWS) for layer, parts in rows.items()}
    return {layer: (m.weight, m.bias, list(inputs[layer])) for layer, m in modules.items()}


def make_real(cell: Cell) -> Problem:
    """The tensors of a real cell: adapters as after some training (lora_b is not zero)."""
    weight, bias, inputs = _captured()[cell.layer]
    dtype = getattr(torch, cell.dtype)
    generator = torch.Generator().manual_seed(0)
    (n, k), r = weight.shape, cell.rank

    def to(tensor: Tensor) -> Tensor:
        return tensor.detach().to(cell.device, dtype, copy=True)

    lora_a = torch.empty(r, k).uniform_(-(k**-0.5), k**-0.5, generator=generator)
    lora_b = torch.empty(n, r).normal_(std=0.02, generator=generator)
    step = cell.mode == STEP
    return Problem(
        weight=to(weight),
        bias=to(bias),
        lora_a=to(lora_a).float(),
        lora_b=to(lora_b).float(),
        inputs=[to(x).requires_grad_(step) for x in inputs],
        grads=[to(torch.randn(cell.rows, n, generator=generator)) for _ in inputs],
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def numerics(cells: list[Cell]) -> list[dict[str, Any]]:
    """Errors of ours and of PEFT against float64 on the same weights, without dropout.

    One entry for each layer, dtype, tensor (out, dx, dlora_a, dlora_b) and variant; errors are
    relative to the largest and to the rms value of the exact tensor.
    """
    entries = []
    for cell in cells:
        if cell.mode != STEP:
            continue
        problem = make_real(cell)
        reference = _in_float64(problem)
        exact = outputs(BUILDERS["naive"](reference, 0.0), reference, STEP)
        names = ["ours", "ours_packed", "peft"]
        names += ["ours_fp32", "peft_default"] if cell.dtype != "float32" else []
        for name in names:
            entry = {"layer": cell.layer, "dtype": cell.dtype, "variant": name}
            try:
                found = outputs(BUILDERS[name](problem, 0.0), problem, STEP)
            except Exception as error:
                entries.append({**entry, "error": f"{type(error).__name__}: {error}"})
                continue
            for tensor, value in found.items():
                error = error_of(value, exact[tensor])
                measured = {"max": _finite(error.max), "rms": _finite(error.rms)}
                entries.append({**entry, "tensor": tensor, **measured})
    return entries


def _in_float64(problem: Problem) -> Problem:
    """The same values in float64, adapters included."""
    return Problem(
        weight=problem.weight.double(),
        bias=None if problem.bias is None else problem.bias.double(),
        lora_a=problem.lora_a,
        lora_b=problem.lora_b,
        inputs=[problem.inputs[0].detach().double().requires_grad_()],
        grads=[problem.grads[0].double()],
    )
