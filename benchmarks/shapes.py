"""What is measured: the cells of the headline run, of few and many rows and of the full grid."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

FORWARD = "forward"  # under no_grad
STEP = "step"  # forward and backward; x requires grad, the base weight does not
BACKWARD = "backward"  # of a forward that was done before

GRID_ROWS = (1, 16, 512, 2048)
GRID_WIDTHS = (1024, 4096)
GRID_RANKS = (8, 16, 64)
DTYPES = ("float32", "bfloat16")
DROPOUT = 0.05
FEW_ROWS = (1, 2, 4, 8, 16)  # of decoding
# Rows, in and out features -> what a forward may take of merged, and a step of frozen: on AMX, and
# on other processors.
MANY_ROWS = {
    (2048, 576, 576): ((1.08, 1.25), (1.08, 1.20)),
    (2048, 1024, 1024): ((1.00, 1.12), (1.02, 1.10)),
    (2048, 1024, 4096): ((0.97, 1.05), (0.99, 1.03)),
    (1024, 4096, 4096): ((0.89, 1.00), (0.95, 0.98)),
}
TARGET_EFFORT = 2.0
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Cell:
    """One measured situation: y [rows, out] = LoRA linear of x [rows, in] at one rank and dtype."""

    mode: str
    dtype: str
    rows: int
    in_features: int
    out_features: int
    rank: int = 16
    dropout_p: float = 0.0
    bias: bool = True
    layer: str = ""  # a named projection; empty for a square of the grid
    group: str = "grid"  # grid | model | real | call
    device: str = "cpu"
    all_peers: bool = True  # False: only the peers that the targets need
    compiled: bool = False  # also torch.compile, which takes seconds to compile
    memory: bool = True
    effort: float = 1.0  # how much longer than other cells to measure

    @property
    def id(self) -> str:
        """A readable name, unique within a run."""
        place = self.layer or f"{self.in_features}x{self.out_features}"
        dropout = f" dropout {self.dropout_p:g}" if self.dropout_p else ""
        return f"{place} {self.mode} {SHORT[self.dtype]} M={self.rows} r={self.rank}{dropout}"

    def as_dict(self) -> dict[str, Any]:
        """The fields and the id, for the JSON."""
        return {"id": self.id, **asdict(self)}


def reading_order(row: dict[str, Any]) -> tuple[Any, ...]:
    """A key that sorts rows: real layers, named models, the grid; then dtype, dropout and size."""
    cell = row["cell"]
    group = ("call", "real", "model", "grid").index(cell["group"])
    fields = ("dtype", "dropout_p", "in_features", "out_features", "rows", "rank")
    return (group, *(cell[field] for field in fields))


def square(mode: str, dtype: str, width: int, rows: int, **fields: Any) -> Cell:
    """A cell with K = N = width."""
    return Cell(mode, dtype, rows, width, width, **fields)


# Linear layers of named models -> in_features, out_features, bias, dtype, and the numbers of rows
# at which they are used in a forward and in a step.
PROJECTIONS = {
    "MiniLM-L6 query": (384, 384, True, "float32", (128,), (128,)),
    "MiniLM-L6 intermediate": (384, 1536, True, "float32", (128,), (128,)),
    "GPT-2 medium c_attn": (1024, 3072, True, "float32", (1, 1024), (1024,)),
    "GPT-2 medium c_fc": (1024, 4096, True, "float32", (1, 1024), (1024,)),
    "GPT-2 medium mlp.c_proj": (4096, 1024, True, "float32", (1, 1024), (1024,)),
    "Qwen2.5 7B q_proj": (3584, 3584, True, "bfloat16", (1, 512), (2048,)),
    "Qwen2.5 7B k_proj": (3584, 512, True, "bfloat16", (1, 512), (2048,)),
    "Llama-3.1 8B q_proj": (4096, 4096, False, "bfloat16", (1, 512), (2048,)),
    "Llama-3.1 8B k_proj": (4096, 1024, False, "bfloat16", (1, 512), (2048,)),
    "Llama-3.1 8B up_proj": (4096, 14336, False, "bfloat16", (1, 512), (512,)),
    "Llama-3.1 8B down_proj": (14336, 4096, False, "bfloat16", (1, 512), (512,)),
    "Mistral 7B v_proj": (4096, 1024, False, "bfloat16", (16,), (1024,)),
    "Mistral 7B gate_proj": (4096, 14336, False, "bfloat16", (16,), ()),
}


def projection(name: str, mode: str, rows: int, **fields: Any) -> Cell:
    """A cell of one of PROJECTIONS."""
    k, n, bias, dtype, *_ = PROJECTIONS[name]
    return Cell(mode, dtype, rows, k, n, bias=bias, layer=name, group="model", **fields)


def call_cells(device: str = "cpu") -> list[Cell]:
    """The cost of a call itself: tensors so small that nothing else counts."""
    return [
        Cell(mode, "float32", 2, 8, 8, rank=2, layer="call", group="call", device=device)
        for mode in (FORWARD, STEP)
    ]


def target_cells() -> list[Cell]:
    """The cells that the acceptance figures other than "never slower" are read from."""
    forward = [square(FORWARD, "float32", 4096, rows) for rows in (16, 512, 2048)]
    forward += [square(FORWARD, "bfloat16", 4096, rows) for rows in (512, 2048)]
    forward += [square(FORWARD, "bfloat16", 1024, 2048, dropout_p=DROPOUT)]
    step = [square(STEP, "bfloat16", width, 2048, dropout_p=DROPOUT) for width in (4096, 1024)]
    cells = [*call_cells(), *step, *forward]
    return [replace(cell, effort=TARGET_EFFORT) for cell in cells]


def headline_cells() -> list[Cell]:
    """The cells of the short run: every single-cell target, and a few that show the range."""
    return [
        *target_cells(),
        square(FORWARD, "bfloat16", 4096, 16),
        square(STEP, "bfloat16", 1024, 2048, compiled=True),
        square(STEP, "float32", 1024, 2048, dropout_p=DROPOUT),
        projection("GPT-2 medium c_fc", FORWARD, 1024),
        projection("Qwen2.5 7B k_proj", FORWARD, 512),
        projection("Llama-3.1 8B q_proj", FORWARD, 1),
    ]


def few_rows_cells() -> list[Cell]:
    """Forward of 1 to 16 rows, at each size, rank and dtype of the grid."""
    return [
        square(FORWARD, dtype, width, rows, rank=rank, all_peers=False, memory=False)
        for dtype, width, rank, rows in product(DTYPES, GRID_WIDTHS, GRID_RANKS, FEW_ROWS)
    ]


def many_rows_cells() -> list[Cell]:
    """Forward, and a step with dropout, where products take most of the time."""
    return [
        Cell(mode, "bfloat16", *size, dropout_p=p, bias=False, all_peers=False, memory=False)
        for size in MANY_ROWS
        for mode, p in ((FORWARD, 0.0), (STEP, DROPOUT))
    ]


def grid_cells() -> list[Cell]:
    """The whole grid. Forward with dropout and the memory figures are taken at rank 16 only."""
    kinds = ((FORWARD, 0.0), (STEP, 0.0), (STEP, DROPOUT), (FORWARD, DROPOUT))
    cells = []
    for rank in sorted(GRID_RANKS, key=lambda rank: rank != 16):
        main = rank == 16
        for dtype, (mode, dropout_p), width, rows in product(DTYPES, kinds, GRID_WIDTHS, GRID_ROWS):
            if main or (mode, dropout_p) != (FORWARD, DROPOUT):
                fields = {"rank": rank, "dropout_p": dropout_p, "all_peers": main, "memory": main}
                cells.append(square(mode, dtype, width, rows, **fields))
    return cells


def full_cells() -> list[Cell]:
    """The headline cells, the projections of named models, then the rest of the grid."""
    models = [
        projection(name, mode, rows, dropout_p=DROPOUT if mode == STEP else 0.0, all_peers=False)
        for name, (*_, forward_rows, step_rows) in PROJECTIONS.items()
        for mode, counts in ((FORWARD, forward_rows), (STEP, step_rows))
        for rows in counts
    ]
    unique: dict[str, Cell] = {}
    compiled = square(FORWARD, "bfloat16", 1024, 2048, compiled=True)
    for cell in [*headline_cells(), compiled, *models, *grid_cells()]:
        unique.setdefault(cell.id, cell)
    return list(unique.values())
