"""Labelled English sentences: which area of Python's standard library does one describe?

The texts are sentences of the docstrings in the standard library's own sources, which are parsed
and never imported. The label is the area that the module belongs to: one chapter of the Library
Reference, or a few that stand side by side there. No sentence has two labels, and no two sentences
are near duplicates (a Jaccard similarity of their sets of words of NEAR or more). A class with all
its methods, or a function, lies as a whole in the training texts or in the held-out ones.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from ..sentences import sentences_of

# Area -> modules and packages that are in every Python from 3.10 on; also the private ones that
# hold the docstrings of a public module.
AREAS = {
    "numbers and data types": "numbers fractions _pydecimal statistics random datetime _pydatetime "
    "calendar collections _collections_abc heapq bisect enum types copy pprint weakref graphlib",
    "text and markup": "string re difflib textwrap codecs locale gettext html xml",
    "files and archives": "pathlib shutil tempfile tarfile zipfile gzip bz2 lzma fileinput filecmp "
    "glob fnmatch linecache stat genericpath posixpath ntpath pickle shelve csv configparser",
    "operating system": "os io _pyio logging platform getpass argparse optparse getopt cmd",
    "concurrency": "threading multiprocessing concurrent subprocess queue sched asyncio selectors",
    "internet data": "email json mailbox mimetypes base64 quopri",
    "internet protocols": "http urllib ftplib poplib imaplib smtplib socketserver xmlrpc wsgiref "
    "ipaddress uuid webbrowser",
    "testing and debugging": "unittest doctest pydoc bdb pdb timeit trace tracemalloc profile "
    "cProfile pstats",
    "interpreter and imports": "inspect traceback warnings dataclasses contextlib abc site "
    "sysconfig importlib pkgutil zipimport modulefinder runpy ast dis symtable tokenize tabnanny "
    "pyclbr py_compile compileall pickletools",
}
TRAIN_PER_AREA = 350  # at most
HELD_OUT_PER_AREA = 80  # at most
NEAR = 0.6
_SKIPPED_FOLDERS = {"test", "tests", "__pycache__"}


@dataclass(frozen=True)
class Text:
    """One sentence, its label (an index into the areas) and the definition it comes from."""

    sentence: str
    label: int
    origin: str  # file:definition


@dataclass(frozen=True)
class Dataset:
    """Training and held-out texts, and the names of their labels."""

    areas: tuple[str, ...]
    train: tuple[Text, ...]
    held_out: tuple[Text, ...]

    def counts(self, texts: Iterable[Text]) -> dict[str, int]:
        """Area -> number of texts."""
        found = dict.fromkeys(self.areas, 0)
        for text in texts:
            found[self.areas[text.label]] += 1
        return found

    def majority(self) -> float:
        """Accuracy on the held-out texts of always answering their most frequent area."""
        return max(self.counts(self.held_out).values()) / len(self.held_out)

    def definitions_on_both_sides(self) -> int:
        """How many classes and functions have texts in the training and in the held-out part."""
        return len({t.origin for t in self.train} & {t.origin for t in self.held_out})

    def largest_similarity(self) -> float:
        """Largest Jaccard similarity of a held-out text's words to a training text's."""
        train = [words(text.sentence) for text in self.train]
        held_out = [words(text.sentence) for text in self.held_out]
        largest = 0.0
        for a in held_out:
            for b in train:
                # No pair is more similar than its sizes are.
                if min(len(a), len(b)) > largest * max(len(a), len(b)):
                    largest = max(largest, len(a & b) / len(a | b))
        return largest


def _sources(name: str, root: Path) -> list[Path]:
    """The files of a module or of a package and its subpackages, without tests."""
    module, package = root / f"{name}.py", root / name
    if module.is_file():
        return [module]
    files = package.rglob("*.py")
    return sorted(f for f in files if not _SKIPPED_FOLDERS & set(f.relative_to(root).parts))


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """(outermost definition, docstring) of a module, its classes and its functions, in order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes in the sources
        tree = ast.parse(path.read_bytes())
    stack: list[tuple[ast.AST, str]] = [(tree, "")]
    while stack:
        node, outermost = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if not isinstance(node, ast.Module):
                outermost = outermost or node.name
            docstring = ast.get_docstring(node)
            if docstring:
                yield outermost, docstring
        stack += [(child, outermost) for child in reversed(list(ast.iter_child_nodes(node)))]


def all_texts(root: Path | None = None) -> list[Text]:
    """Every distinct sentence with one label, in the order of AREAS and the sources.

    root: folder of the standard library's sources; by default that of the running Python
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    texts: dict[str, Text] = {}
    ambiguous: set[str] = set()
    for label, names in enumerate(AREAS.values()):
        for path in (path for name in names.split() for path in _sources(name, root)):
            for definition, docstring in _docstrings(path):
                origin = f"{path.relative_to(root).as_posix()}:{definition}"
                for sentence in sentences_of(docstring):
                    first = texts.setdefault(sentence, Text(sentence, label, origin))
                    if first.label != label:
                        ambiguous.add(sentence)
    return [text for text in texts.values() if text.sentence not in ambiguous]


def words(sentence: str) -> frozenset[str]:
    """The lower-case words of a sentence, without digits and punctuation."""
    return frozenset(re.findall(r"[a-z]+", sentence.lower()))


def without_near_duplicates(texts: Iterable[Text], near: float = NEAR) -> list[Text]:
    """The texts whose set of words has a Jaccard similarity below `near` to each one kept before.

    Two sets that are that similar share a word among the rarest |set| - ceil(near |set|) + 1 of
    each, so that only texts with such a word in common are compared (prefix filtering: Chaudhuri,
    Ganti and Kaushik 2006).
    """
    texts = list(texts)
    sets = [words(text.sentence) for text in texts]
    frequency: dict[str, int] = defaultdict(int)
    for found in sets:
        for word in found:
            frequency[word] += 1
    kept: list[Text] = []
    by_rare_word: dict[str, list[frozenset[str]]] = defaultdict(list)
    for text, found in zip(texts, sets, strict=True):
        rarest = sorted(found, key=lambda word: (frequency[word], word))
        rarest = rarest[: len(found) - ceil(near * len(found)) + 1]
        rivals = {rival for word in rarest for rival in by_rare_word[word]}
        if any(len(found & rival) >= near * len(found | rival) for rival in rivals):
            continue
        kept.append(text)
        for word in rarest:
            by_rare_word[word].append(found)
    return kept


def _order(text: str) -> int:
    """A fixed pseudo-random order, the same on every machine."""
    return zlib.crc32(text.encode())


def split(texts: Iterable[Text]) -> Dataset:
    """Fill each area's held-out texts with whole definitions; train on definitions not in there."""
    by_origin: dict[tuple[int, str], list[Text]] = defaultdict(list)
    for text in texts:
        by_origin[text.label, text.origin].append(text)
    train: list[Text] = []
    held_out: list[Text] = []
    for label in range(len(AREAS)):
        origins = [origin for area, origin in by_origin if area == label]
        origins.sort(key=lambda origin: (_order(origin), origin))
        rest: list[Text] = []
        free = HELD_OUT_PER_AREA
        for origin in origins:
            group = by_origin[label, origin]
            if len(group) <= free:
                held_out += group
                free -= len(group)
            else:
                rest += group
        rest.sort(key=lambda text: (_order(text.sentence), text.sentence))
        train += rest[:TRAIN_PER_AREA]
    return Dataset(tuple(AREAS), tuple(train), tuple(held_out))


def read(root: Path | None = None) -> Dataset:
    """The data set of the running Python, always the same for one version of it.

    Raises: RuntimeError where the standard library's sources are not installed
    """
    dataset = split(without_near_duplicates(all_texts(root)))
    least = len(AREAS) * TRAIN_PER_AREA // 2
    if len(dataset.train) < least:
        raise RuntimeError(
            f"benchmarks.finetune: expected at least {least} sentences in the docstrings of the "
            f"standard library, but got {len(dataset.train)}; use a Python that comes with its "
            "sources"
        )
    return dataset
