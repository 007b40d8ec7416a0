"""What is said of the training and serving of many adapters: claims, tasks, times, method."""

from __future__ import annotations

from collections.abc import Sequence

from .. import markdown
from ..markdown import claims_table, mebibytes, quotient, table, with_quartiles
from ..results import Document, peak_ratio, ratio

LABELS = {
    "together": "all tasks in one batch",
    "in_turn": "one task after the other",
    "peft": "PEFT, one task after the other",
}
_METHOD = """\
- Texts are those of `make demo`, with its split. A task tells one area of the standard library from
  all others; half of its texts are of the area. Tasks differ in rank and in learning rate, and each
  has a head, an AdamW and a clipping of its own.
- The model is MiniLM-L6 with mean pooling, in float32 and frozen, with adapters in all 36 linear
  layers of the encoder; its own dropout is off. Adapters and heads start from the same values in
  all three.
- In one batch: the rows of all tasks, each with its own adapter (`use_adapters`), and the sum of
  the tasks' own mean losses. One after the other: a step of each task on its own rows, without the
  padding that only others need, with its adapter active. PEFT cannot train a mixed batch.
- Times are of forward and backward of all eight tasks, in turns on the same texts, medians with
  quartiles in brackets; "!" marks fewer than three steps that no other process disturbed.
- Memory is what torch's allocator holds at the peak above what was live before. One batch of all
  tasks has the activations of eight; one after the other has those of one at a time.
- With dropout, a mask depends on a seed and on a row's place in the batch. For the comparison a
  task that is trained alone gets the whole batch, in which only its own rows have an adapter and
  a loss; so its rows have the masks that they have among the others.
- Served: held-out texts of all tasks in a random order, in mixed batches, beside each text alone
  with its adapter active. Differences of logits are relative to the largest. In bfloat16 the
  encoder is rounded, adapters and heads stay in float32.\
"""


def _tasks(document: Document) -> str:
    rows = []
    for place, task in enumerate(document["tasks"]):
        last = [step[place] for step in document["losses"]["together"][-10:]]
        rows.append(
            [
                task["name"],
                str(task["rank"]),
                f"{task['rate']:g}",
                f"{document['losses']['together'][0][place]:.3f}",
                f"{sum(last) / len(last):.3f}",
                f"{document['differences']['in_turn'][place]:.1e}",
                f"{document['differences']['dropout'][place]:.1e}",
            ]
        )
    header = ["task", "rank", "rate", "first loss", "last ten", "from alone", "with dropout"]
    return table(header, rows)


def _times(document: Document) -> str:
    rows = []
    for name, label in LABELS.items():
        rows.append(
            [
                label,
                with_quartiles(document["timing"][name]),
                quotient(ratio(document, name, "together"), spread=name != "together"),
                mebibytes(document["memory"][name]["peak"]),
                quotient(peak_ratio(document, name, "together")),
            ]
        )
    settings = document["settings"]
    lead = (
        f"{settings['steps']} steps of {settings['rows']} texts of each of "
        f"{len(document['tasks'])} tasks; the whole run took {document['seconds']:.0f} s."
    )
    header = ["trained", "forward + backward", "x one batch", "peak", "x one batch"]
    return f"{lead}\n\n{table(header, rows)}"


def text(document: Document, images: Sequence[str]) -> str:
    """The whole report."""
    bodies = [
        ("What is claimed, and whether it holds", claims_table(document)),
        ("The tasks", _tasks(document)),
        ("Time and memory", _times(document)),
        ("Method", _METHOD),
    ]
    return markdown.page(
        "CPU report: eight adapters of one model, trained and served in one batch",
        markdown.machine_lines(document),
        *markdown.pictures(images, "CPU"),
        *markdown.sections(bodies),
    )
