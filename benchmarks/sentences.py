"""English sentences in docstrings."""

from __future__ import annotations

import re
from collections.abc import Iterator

_LEAST_WORDS = 6
_SENTENCE = re.compile(r"[A-Z][\w ,;:()'\"-]*[.!?]")
_BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])\s+")


def sentences_of(docstring: str) -> Iterator[str]:
    """Sentences of at least six words, without markup or code, of paragraphs without doctests.

    docstring: without indentation, as `inspect.getdoc` returns it
    """
    for paragraph in docstring.split("\n\n"):
        if ">>>" in paragraph:
            continue
        for part in _BETWEEN_SENTENCES.split(" ".join(paragraph.split())):
            if _SENTENCE.fullmatch(part) and len(part.split()) >= _LEAST_WORDS:
                yield part
