"""What is measured on a GPU: about 60 headline cells, then the wide set, in order of importance.

Projections are those of the models' published configurations; layers of one shape are one cell.
"""

from __future__ import annotations

from dataclasses import replace

from ..shapes import BACKWARD, DROPOUT, FORWARD, STEP, Cell, call_cells

ROWS = 8192  # of training: batch times sequence length

# name -> in_features, out_features, bias
PROJECTIONS = {
    "Llama-3.1 8B, Mistral 7B q_proj": (4096, 4096, False),
    "Llama-3.1 8B, Mistral 7B k_proj": (4096, 1024, False),
    "Llama-3.1 8B, Mistral 7B up_proj": (4096, 14336, False),
    "Llama-3.1 8B, Mistral 7B down_proj": (14336, 4096, False),
    "Llama-3.1 70B q_proj": (8192, 8192, False),
    "Llama-3.1 70B k_proj": (8192, 1024, False),
    "Llama-3.1 70B up_proj": (8192, 28672, False),
    "Llama-3.1 70B down_proj": (28672, 8192, False),
    "Qwen2.5 7B q_proj": (3584, 3584, True),
    "Qwen2.5 7B k_proj": (3584, 512, True),
    "Qwen2.5 7B up_proj": (3584, 18944, False),
    "Qwen2.5 7B down_proj": (18944, 3584, False),
    "GPT-2 medium c_attn": (1024, 3072, True),
    "GPT-2 medium c_fc": (1024, 4096, True),
    "GPT-2 medium mlp.c_proj": (4096, 1024, True),
}


def _projection(name: str, mode: str, rows: int = ROWS, **fields) -> Cell:
    k, n, bias = PROJECTIONS[name]
    fields = {"memory": mode == STEP, **fields}
    return Cell(
        mode, "bfloat16", rows, k, n, bias=bias, layer=name, group="model", device="cuda", **fields
    )


def _square(mode: str, rows: int, width: int = 4096, **fields) -> Cell:
    fields = {"dtype": "bfloat16", "memory": mode == STEP, **fields}
    size = {"in_features": width, "out_features": width, "bias": False, "device": "cuda"}
    return Cell(mode, rows=rows, **size, **fields)


def headline_cells() -> list[Cell]:
    """The layers people adapt, at training size, and how rows, rank and dtype matter."""
    dropped = {"dropout_p": DROPOUT}
    squares = [
        _square(FORWARD, ROWS),
        _square(STEP, ROWS, **dropped),
        _square(BACKWARD, ROWS, **dropped),
        _square(FORWARD, 2048, compiled=True),
        _square(STEP, 2048, compiled=True),
        *(_square(FORWARD, rows) for rows in (512, 64, 16, 8, 1)),
        *(_square(FORWARD, rows, width=8192) for rows in (64, 8, 1)),
        *(_square(BACKWARD, rows, **dropped) for rows in (2048, 512)),
        *(_square(mode, ROWS, rank=r) for r in (8, 64, 128, 256) for mode in (FORWARD, BACKWARD)),
        *(_square(mode, ROWS, dtype="float16") for mode in (FORWARD, BACKWARD)),
    ]
    apart = [
        _projection(name, mode, dropout_p=DROPOUT if mode == BACKWARD else 0.0)
        for name in PROJECTIONS
        for mode in (FORWARD, BACKWARD)
    ]
    steps = [_projection(name, STEP, **dropped) for name in list(PROJECTIONS)[:6]]
    return [*call_cells("cuda"), *squares, *steps, *apart]


def wide_cells() -> list[Cell]:
    """Every projection at every number of rows, with and without dropout, and at other ranks."""
    found = []
    for rank in (16, 64):
        for name in PROJECTIONS:
            for rows in (2048, 512, 64, 1):
                found.append(_projection(name, FORWARD, rows, rank=rank))
            for rows in (ROWS, 2048):
                found.append(_projection(name, STEP, rows, rank=rank, dropout_p=DROPOUT))
                found.append(_projection(name, BACKWARD, rows, rank=rank))
    headline = {cell.id for cell in headline_cells()}
    return [cell for cell in found if cell.id not in headline]


def on_cpu(cells: list[Cell]) -> list[Cell]:
    """The same set, small, without what needs minutes: to try the code without a GPU."""
    small = []
    for cell in cells:
        rows = min(cell.rows, 16)
        sizes = (min(cell.in_features, 256), min(cell.out_features, 256))
        layer = cell.layer
        if cell.group == "model":
            layer += f", cut to {sizes[0]}x{sizes[1]}"
        cut = replace(cell, layer=layer, device="cpu", compiled=False, rank=min(cell.rank, 16))
        small.append(replace(cut, rows=rows, in_features=sizes[0], out_features=sizes[1]))
    return list({cell.id: cell for cell in small}.values())
