"""What is said of the training of experts: claims, times, memory, method."""

from __future__ import annotations

from collections.abc import Sequence

from .. import markdown
from ..markdown import claims_table, mebibytes, milliseconds, quotient, table, with_quartiles
from ..results import Document, peak_ratio, ratio
from .models import LABELS
from .two_tasks import LABELS as LABELS_OF_TWO
from .two_tasks import passes

_METHOD = """\
- Texts, split, batches and AdamW are those of `make demo`, with fewer steps and held-out texts.
- The model is MiniLM-L6 with each feed-forward upcycled into 8 experts, 2 for each token: copies
  of the dense one to begin with, behind a random router that stays as it is. float32, frozen.
- Adapters sit in the attention's linear layers and on both stacks of each layer's experts, with a
  rank for each expert; lora_ext's by "all-linear", PEFT's by target_modules and
  target_parameters. Head and adapters start from the same values. There is no dropout, which PEFT
  does not have for parameters.
- The variants take their steps in turns on the same batches. Times are of forward and backward,
  medians with quartiles in brackets; "!" marks a model that has fewer than three steps that no
  other process disturbed. frozen trains the head alone, with a gradient that flows through all
  layers, in transformers' own forward of experts, which PEFT's wrappers call, too.
- Losses are compared with PEFT's as long as all tokens have the same experts in both models: where
  a token's second and third score are nearly the same, a rounding decides between two experts, and
  from there on the two are trained on other routes.
- Memory is what torch's allocator holds at the peak of forward and backward on the batch with the
  most tokens, above what was live before.
- Two tasks, each with a rank, a rate, a head and an AdamW of its own, tell one area of the standard
  library from the others, as in `make demo-many`; they see the same texts in each pass. lora_ext
  takes the rows of both in one batch (`use_adapters`), with dropout on attention and experts or
  without. PEFT refuses both on experts, dropout and a mixed batch: it takes no dropout, and a step
  of each task on its own rows, without the padding that only the other's need. Losses with dropout
  are for that reason compared with lora_ext's own: a task alone has the whole batch, in which the
  other's rows have no adapter, so that its rows have the same masks.\
"""


def _training(document: Document) -> str:
    rows = []
    for name, label in LABELS.items():
        found, peak = document["timing"][name], document["memory"][name]["peak"]
        mark = "!" if found["disturbed"] else ""
        spread = f"({found['p25']:.0f}-{found['p75']:.0f}){mark}"
        rows.append(
            [
                label,
                f"{100 * document['accuracy'][name]:.1f}%",
                f"{document['losses'][name][0]:.3f}",
                f"{sum(document['losses'][name][-10:]) / len(document['losses'][name][-10:]):.3f}",
                f"{milliseconds(found['ms'])} {spread}",
                quotient(ratio(document, name, "frozen"), spread=name != "frozen"),
                mebibytes(peak),
                quotient(peak_ratio(document, name, "frozen")),
            ]
        )
    header = ["model", "accuracy", "first loss", "last ten"]
    header += ["forward + backward", "x frozen", "peak", "x frozen"]
    settings = document["settings"]
    said = (
        f"{settings['steps']} steps of {settings['rows']} texts; {settings['trainable']:,} of "
        f"{settings['parameters']:,} parameters are trained. The whole run took "
        f"{document['seconds']:.0f} s."
    )
    found = ratio(document, "ours", "peft")
    if found:
        said += f" lora_ext's steps take {quotient(found, spread=True)} x PEFT's time."
    return f"{said}\n\n{table(header, rows)}"


def _two_tasks(document: Document) -> str:
    found = document["two_tasks"]
    rows = []
    for name, label in LABELS_OF_TWO.items():
        means = [passes(found, name, place) for place in range(len(found["tasks"]))]
        rows.append(
            [
                label,
                *(f"{each[0]:.3f} to {each[-1]:.3f}" for each in means),
                with_quartiles(found["timing"][name]),
                quotient(ratio(found, name, "peft"), spread=name != "peft"),
                mebibytes(found["memory"][name]["peak"]),
                quotient(peak_ratio(found, name, "peft")),
            ]
        )
    names = [f"{task['name']}, r = {task['rank']}" for task in found["tasks"]]
    header = ["a step of both tasks", *names, "forward + backward", "x PEFT", "peak", "x PEFT"]
    said = (
        f"{found['steps']} steps of {found['rows']} texts of each task, {found['passes']} passes "
        "over the same texts. A task's column has the mean losses of the first pass and the last."
    )
    return f"{said}\n\n{table(header, rows)}"


def text(document: Document, images: Sequence[str]) -> str:
    """The whole report."""
    bodies = [
        ("What is claimed, and whether it holds", claims_table(document)),
        ("Training", _training(document)),
        ("Two tasks in one batch, with dropout", _two_tasks(document)),
        ("Method", _METHOD),
    ]
    return markdown.page(
        "CPU report: the experts of a mixture fine-tuned with lora_ext and with PEFT",
        markdown.machine_lines(document),
        *markdown.pictures(images, "CPU"),
        *markdown.sections(bodies),
    )
