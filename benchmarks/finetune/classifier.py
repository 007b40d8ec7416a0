"""A sentence classifier on MiniLM, and its batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import minilm
from .data import Text

MAX_TOKENS = 64  # of a sentence; what is longer is cut
_SORTED_TOGETHER = 16  # batches whose sentences are sorted by length


@dataclass(frozen=True)
class Batch:
    """Some sentences of similar length."""

    ids: Tensor  # [rows, tokens]
    mask: Tensor  # [rows, tokens], 0 where a sentence is padded
    labels: Tensor  # [rows]


def _let_gradients_start(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def mean_of_tokens(encoder: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean of the last hidden states over a text's tokens: ``[rows, H]``, float32."""
    hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    weight = mask.unsqueeze(-1).float()
    return (hidden * weight).sum(1) / weight.sum(1)


class Classifier(nn.Module):
    """logits [rows, classes] = head(mean_of_tokens(encoder, ids, mask)).

    The embeddings' output asks for its gradient, so that one flows through every layer in each
    variant alike, also where nothing below the head is trained.
    """

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)
        encoder.get_submodule("embeddings").register_forward_hook(_let_gradients_start)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(mean_of_tokens(self.encoder, ids, mask))


def load_classifier(
    classes: int, dtype: torch.dtype = torch.float32, head_seed: int = 0
) -> Classifier:
    """MiniLM as it comes, frozen, in `dtype`, with a new float32 head.

    MiniLM's own dropout is off: it would draw different numbers in each variant.
    """
    encoder = minilm.encoder(dtype)
    torch.manual_seed(head_seed)
    return Classifier(encoder, encoder.config.hidden_size, classes)


def batch_of(texts: Sequence[Text], tokenizer: Callable[..., dict[str, Tensor]]) -> Batch:
    """The texts as one batch, padded to the longest."""
    tokens = tokenizer(
        [text.sentence for text in texts],
        padding=True,
        truncation=True,
        max_length=MAX_TOKENS,
        return_tensors="pt",
    )
    labels = torch.tensor([text.label for text in texts])
    return Batch(tokens["input_ids"], tokens["attention_mask"], labels)


def batches_of(
    texts: Sequence[Text], rows: int, tokenizer: Callable[..., dict[str, Tensor]]
) -> list[Batch]:
    """The texts in this order, `rows` at a time."""
    starts = range(0, len(texts), rows)
    return [batch_of(texts[start : start + rows], tokenizer) for start in starts]


def largest_batch(batches: Sequence[Batch]) -> Batch:
    """The one with the most tokens, padding included."""
    return max(batches, key=lambda batch: batch.ids.numel())


def training_order(lengths: Sequence[int], rows: int, seed: int) -> list[int]:
    """A random order in which each `rows` neighbours are of similar length: little padding.

    As many texts as fill whole batches; the rest is left out.
    """
    draw = random.Random(seed)
    order = list(range(len(lengths)))
    draw.shuffle(order)
    order = order[: len(order) // rows * rows]
    together = rows * _SORTED_TOGETHER
    chunks = [order[start : start + together] for start in range(0, len(order), together)]
    batches = []
    for chunk in chunks:
        chunk.sort(key=lambda index: lengths[index])
        batches += [chunk[start : start + rows] for start in range(0, len(chunk), rows)]
    draw.shuffle(batches)
    return [index for batch in batches for index in batch]
