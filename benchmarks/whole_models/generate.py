"""Tokens of `generate` with a KV cache: merged, PEFT, ours, and packed ones beside."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

import lora_ext

from ..markdown import Column, ratio_columns, table_of
from ..results import Row
from ..timing import Plan, compared
from .calls import with_adapters
from .cases import llama_config
from .packed import FROZEN_PACKED, frozen_packed

BATCHES = (1, 8)
DTYPES = ("bfloat16", "float32")
TOKENS, PROMPT = 16, 16
_LABELS = {
    "peft": "PEFT",
    "peft_accelerated": "PEFT, accelerated",
    "ours": "ours",
    "peft_default": "PEFT default",
    "peft_default_accelerated": "PEFT default, accelerated",
    "ours_fp32": "ours, float32 adapters",
    FROZEN_PACKED: "merged, packed",
    "ours packed": "ours, packed",
}


def _base(dtype: str, layers: int) -> Any:
    """The shape of a Llama of 135M parameters, with random weights."""
    import transformers

    torch.manual_seed(0)
    config = llama_config(True, vocab_size=4096)
    config.update({"num_hidden_layers": layers, "tie_word_embeddings": True, "use_cache": True})
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)


def _models(dtype: str, layers: int) -> dict[str, Any]:
    base = _base(dtype, layers)
    paths = [path for path, _ in base.named_modules() if path.endswith("_proj")]
    names = ["ours", "peft", "peft_accelerated"]
    if dtype != "float32":
        names += ["ours_fp32", "peft_default", "peft_default_accelerated"]
    found: dict[str, Any] = {"merged": base}
    for name in names:
        model = with_adapters(copy.deepcopy(base), name, target_modules=paths)
        found[name] = model.eval().requires_grad_(False)
    packed = copy.deepcopy(found["ours"])
    lora_ext.warmup(packed, rows=(*BATCHES, PROMPT), progress=False)
    found["ours packed"] = packed
    found[FROZEN_PACKED] = frozen_packed(packed, base)
    return found


def measure(plan: Plan, progress: Callable[[str], None], layers: int = 30) -> list[Row]:
    """Milliseconds of a `generate` of `TOKENS` tokens, as plain JSON."""
    rows = []
    for dtype in DTYPES:
        progress(f"generate, {dtype}: makes the models")
        models = _models(dtype, layers)
        for batch in BATCHES:
            progress(f"generate, {dtype}, batch {batch}")
            calls = {name: _call(model, batch) for name, model in models.items()}
            rows.append({"id": f"{dtype}, batch {batch}", "timing": compared(calls, plan)})
    return rows


def _call(model: Any, batch: int) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(1)
    prompts = itertools.cycle(
        [torch.randint(1, 4096, (batch, PROMPT), generator=generator) for _ in range(3)]
    )

    def generate() -> None:
        with torch.no_grad():
            model.generate(
                input_ids=next(prompts),
                do_sample=False,
                min_new_tokens=TOKENS,
                max_new_tokens=TOKENS,
            )

    generate()
    return generate


def table(rows: Sequence[Row]) -> str:
    """Tokens a second of the merged model, and times over its."""

    def tokens(row: Row) -> str:
        batch = int(row["id"].rpartition(" ")[2])
        return f"{1000 * TOKENS * batch / row['timing']['merged']['ms']:.0f}"

    columns: list[Column] = [
        ("model, batch", lambda row: row["id"]),
        ("merged, tokens/s", tokens),
    ]
    return table_of(rows, [*columns, *ratio_columns(_LABELS, "merged")])
