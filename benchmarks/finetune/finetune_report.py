"""What is said of a fine-tuning: claims, training, files, texts."""

from __future__ import annotations

from collections.abc import Sequence

from .. import markdown
from ..markdown import claims_table, mebibytes, milliseconds, quotient, table, with_quartiles
from ..results import Document, peak_ratio, ratio
from .trained_models import LABELS

_METHOD = """\
- Texts: sentences of at least six words in the docstrings of the standard library's own sources
  (parsed, not imported). The label is the area of the module, which is a chapter of the Library
  Reference or a few neighbouring ones. A sentence of two areas is left out, and so is one whose set
  of words has a Jaccard similarity of 0.6 or more to another's. A class with its methods, or a
  function, lies on one side of the split as a whole. The texts depend on the standard library
  that is installed, and on nothing else.
- The model is MiniLM-L6 with mean pooling over the tokens and a linear head, in float32; its own
  dropout is off. The adapters sit in all 36 linear layers of the encoder; head and adapters start
  from the same values in every variant. AdamW, the rate falls linearly to zero. The head alone has
  a rate of its own, of 0.001, 0.01, 0.03 and 0.1 the best for it on the held-out texts.
- All variants take a step on a batch, in a new order each time, before the next batch comes; so a
  slow minute hits them all alike. Times are medians over the steps with quartiles in brackets,
  ratios medians of the quotient within a step. A step during which our own threads waited more than
  3% of the time for a core does not count; "!" marks a model that has fewer than three others.
- frozen trains the head alone; its forward and backward, with a gradient that flows through all
  layers down to the embeddings as in the others, is the floor of the times and of the memory.
- Memory is what torch's allocator holds at the peak of forward and backward on the batch with the
  most tokens, above what was live before: activations, temporaries and gradients, but neither
  weights nor AdamW's state, which are the same for ours and PEFT. The resident size of a process
  would be mostly torch itself.
- Deviation is |loss - PEFT's loss| / PEFT's loss of a step. Differences of logits are relative to
  the largest logit's magnitude. The held-out texts come in the same batches to every model.
- In the bfloat16 part the encoder is in bfloat16 and the adapters in float32, as PEFT does unless
  told otherwise. It takes a few steps on the same batches, for times and memory alone.\
"""


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _data(document: Document) -> str:
    data = document["data"]
    rows = [
        [area, str(count), str(data["held_out"][area]), data["examples"][area]]
        for area, count in data["train"].items()
    ]
    totals = [str(sum(data[part].values())) for part in ("train", "held_out")]
    rows.append(["all", *totals, ""])
    counts = table(["area", "training", "held out", "a held-out text"], rows, (0, 3))
    majority = f"Always answering the most frequent area: {_percent(data['majority'])}."
    return f"{counts}\n\n{majority}"


def _time(part: Document, name: str) -> list[str]:
    """Median time with quartiles, and the same as a multiple of frozen. part: has a timing."""
    ms = with_quartiles(part["timing"][name])
    return [ms, quotient(ratio(part, name, "frozen"), spread=name != "frozen")]


def _memory(part: Document, name: str) -> list[str]:
    """Peak memory, and the same as a multiple of frozen."""
    return [mebibytes(part["memory"][name]["peak"]), quotient(peak_ratio(part, name, "frozen"))]


def _training(document: Document) -> str:
    rows = []
    for name in document["timing"]:
        rows.append(
            [
                LABELS[name],
                _percent(document["accuracy"][name]),
                *_time(document, name),
                milliseconds(document["updates"][name]["ms"]),
                *_memory(document, name),
            ]
        )
    header = ["model", "accuracy", "forward + backward", "x frozen", "AdamW", "peak", "x frozen"]
    return table(header, rows)


def _against_peft(document: Document) -> str:
    lines = []
    for suffix, where in (("", "without dropout"), ("_dropout", "with dropout")):
        found = ratio(document, f"ours{suffix}", f"peft{suffix}")
        if found:
            lines.append(
                f"- {where}, forward and backward take {quotient(found, spread=True)} x PEFT's time"
            )
    if document["deviation"] is not None:
        lines.append(
            f"- without dropout the {len(document['losses']['ours'])} losses deviate from PEFT's "
            f"by at most {document['deviation']:.1e}, relative"
        )
    return "\n".join(lines)


def _half(document: Document) -> str:
    half = document["half"]
    if "skipped" in half:
        return f"Not measured: {half['skipped']}."
    rows = [[LABELS[name], *_time(half, name), *_memory(half, name)] for name in half["timing"]]
    header = ["model", "forward + backward", "x frozen", "peak memory", "x frozen"]
    return table(header, rows)


def _adapter(document: Document) -> str:
    settings = document["settings"]
    rows = []
    for label, files in (
        ("lora_ext", document["round_trip"]["files"]),
        ("PEFT", document["peft_files"]),
    ):
        for name, size in files.items():
            rows.append([label, name, mebibytes(size)])
    sizes = table(["written by", "file", "size"], rows, (0, 1))
    share = settings["trainable"] / settings["parameters"]
    trained = (
        f"{settings['trainable']:,} of {settings['parameters']:,} parameters are trained "
        f"({_percent(share)}): rank {settings['rank']}, alpha {settings['alpha']}, in "
        f"{', '.join(settings['targets'])}, and the head. The encoder's own weights are "
        f"{mebibytes(settings['encoder_bytes'])}."
    )
    return f"{trained}\n\n{sizes}"


def _settings(document: Document) -> str:
    settings = document["settings"]
    return (
        f"{settings['steps']} steps of {settings['rows']} texts, {settings['tokens']} tokens with "
        f"padding; learning rate {settings['learning_rate']:g}, {settings['head_only_rate']:g} "
        f"for the head alone. The whole run took {document['seconds']:.0f} s."
    )


def text(document: Document, images: Sequence[str]) -> str:
    """The whole report."""
    training = (_settings(document), _training(document), _against_peft(document))
    bodies = [
        ("What is claimed, and whether it holds", claims_table(document)),
        ("Training", "\n\n".join(training)),
        ("bfloat16 encoder, dropout on", _half(document)),
        ("The adapter", _adapter(document)),
        ("The texts", _data(document)),
        ("Method", _METHOD),
    ]
    return markdown.page(
        "CPU report: MiniLM fine-tuned with lora_ext and with PEFT",
        markdown.machine_lines(document),
        *markdown.pictures(images, "CPU"),
        *markdown.sections(bodies),
    )
