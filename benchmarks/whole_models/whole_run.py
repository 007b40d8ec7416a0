"""Fine-tuning as a user runs it: embedding, layers, head, loss, backward and AdamW, on real text.

A Llama of random weights learns to continue docstrings of Python's standard library, in MiniLM's
tokens: PEFT with its defaults, and the same after `lora_ext.accelerate`. Both take each batch in
turn in one process, which gives times and losses; a process of its own for each gives its peak of
memory, weights and all. `python -m benchmarks.whole_models.whole_run ID VARIANT` is that process.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import minilm
from ..markdown import Column, mebibytes, quotient, table_of
from ..memory import process_peak
from ..real_model import sentences
from ..results import Row, ratio
from ..shapes import DROPOUT
from ..timing import Plan, compared
from .calls import with_adapters
from .cases import llama_config

ROWS, LENGTH = 4, 512
STEPS, STEPS_FOR_MEMORY = 30, 3
RATE = 2e-3
VARIANTS = ("peft_default", "peft_default_accelerated")


class Run(NamedTuple):
    """One model, and the dropout of its adapters."""

    model: str
    dropout: float

    @property
    def id(self) -> str:
        return f"{self.model}, dropout {self.dropout:g}"


RUNS = [Run(model, dropout) for model in ("Llama", "Llama 135M") for dropout in (0.0, DROPOUT)]


def batches() -> list[Tensor]:
    """Token ids ``[ROWS, LENGTH]`` of sentences in their order."""
    tokens = minilm.tokenizer()(list(sentences()), add_special_tokens=False)["input_ids"]
    ids = torch.tensor(list(itertools.chain.from_iterable(tokens)))
    return list(ids[: len(ids) // (ROWS * LENGTH) * ROWS * LENGTH].view(-1, ROWS, LENGTH))


def make(run: Run, variant: str) -> Any:
    """A causal LM with PEFT's adapters on all linear layers of its blocks, in training mode."""
    import transformers

    torch.manual_seed(0)
    config = llama_config(run.model != "Llama", vocab_size=30522)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    words = {"lora_dropout": run.dropout, "target_modules": "all-linear"}
    return with_adapters(model, variant, **words).train()


def training(model: Any, data: Sequence[Tensor]) -> Iterator[float]:
    """The loss of each step: one takes place where the next is asked for."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE)
    for ids in itertools.cycle(data):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def peak_of_process(run: Run, variant: str) -> int:
    """Bytes that a process which trains has in memory at most."""
    command = [sys.executable, "-m", __name__, run.id, variant]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def measure(run: Run, plan: Plan, progress: Callable[[str], None], steps: int = STEPS) -> Row:
    """Times, peaks and losses of a run, as plain JSON."""
    progress(f"{run.id}: peaks of memory")
    memory = {variant: {"peak": peak_of_process(run, variant)} for variant in VARIANTS}
    progress(f"{run.id}: trains")
    data = batches()
    losses: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    calls = {
        variant: _step(training(make(run, variant), data), losses[variant]) for variant in VARIANTS
    }
    timing = compared(calls, plan)
    for variant, call in calls.items():
        while len(losses[variant]) < steps:
            call()
    kept = {variant: found[:steps] for variant, found in losses.items()}
    tokens = ROWS * LENGTH
    return {"id": run.id, "tokens": tokens, "timing": timing, "memory": memory, "losses": kept}


def _step(run: Iterator[float], losses: list[float]) -> Callable[[], None]:
    return lambda: losses.append(next(run))


def table(rows: Sequence[Row]) -> str:
    """Tokens a second, peaks of the processes and the last losses, PEFT beside accelerated."""

    def speed(row: Row, variant: str) -> str:
        return f"{1000 * row['tokens'] / row['timing'][variant]['ms']:.0f}"

    def faster(row: Row) -> str:
        return quotient(ratio(row, *VARIANTS), spread=True)

    def loss(row: Row, variant: str) -> str:
        return f"{row['losses'][variant][0]:.3f} -> {row['losses'][variant][-1]:.3f}"

    columns: list[Column] = [("model", lambda row: row["id"])]
    for key, what, shown in (
        ("timing", "tokens/s", speed),
        ("memory", "peak of the process", lambda row, v: mebibytes(row["memory"][v]["peak"])),
        ("losses", "loss, first -> last", loss),
    ):
        if not all(key in row for row in rows):
            continue
        for variant, label in zip(VARIANTS, ("PEFT", "accelerated"), strict=True):
            columns.append((f"{what}: {label}", lambda row, s=shown, v=variant: s(row, v)))
        if key == "timing":
            columns.append(("times as fast", faster))
    return table_of(rows, columns)


if __name__ == "__main__":
    [asked] = [run for run in RUNS if run.id == sys.argv[1]]
    steps = training(make(asked, sys.argv[2]), batches())
    list(itertools.islice(steps, STEPS_FOR_MEMORY))
    print(process_peak())
