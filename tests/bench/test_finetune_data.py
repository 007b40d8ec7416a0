"""The texts of the fine-tuning: sentences, labels, near duplicates, a split by definitions."""

import random
from pathlib import Path

from benchmarks.finetune import data
from benchmarks.finetune.data import Text
from benchmarks.sentences import sentences_of

ROOT = Path(__file__).resolve().parents[2]


def test_sentences_are_whole_and_without_code():
    docstring = (
        "Return the number of words in the text.  Too short.\n"
        "Takes `markup` and so is left out of this.\n\n"
        ">>> count('no sentence of a doctest is taken here')\n\n"
        "lower case sentences are not taken either here.\nDoes a question count as one, too?"
    )
    assert list(sentences_of(docstring)) == [
        "Return the number of words in the text.",
        "Does a question count as one, too?",
    ]


def test_sources_are_parsed_with_definitions(tmp_path):
    (tmp_path / "random.py").write_text(
        '"""Numbers that nobody can foresee at all."""\n'
        "raise RuntimeError('imported')\n"
        "class Outer:\n"
        '    """A thing that holds an inner thing."""\n'
        "    def method(self):\n"
        '        """This method belongs to the outer class."""\n'
        "        class Inner:\n"
        '            """The inner class counts as outer, too."""\n'
    )
    (tmp_path / "json" / "tests").mkdir(parents=True)
    (tmp_path / "json" / "__init__.py").write_text(
        '"""Encode and decode the data of programs.  Said in two areas, so taken from none."""\n'
    )
    (tmp_path / "json" / "tests" / "__init__.py").write_text(
        '"""Tests are no part of what is described."""\n'
    )
    (tmp_path / "queue.py").write_text('"""Said in two areas, so taken from none."""\n')
    areas = list(data.AREAS)
    numbers, internet = areas.index("numbers and data types"), areas.index("internet data")
    assert data.all_texts(tmp_path) == [
        Text("Numbers that nobody can foresee at all.", numbers, "random.py:"),
        Text("A thing that holds an inner thing.", numbers, "random.py:Outer"),
        Text("This method belongs to the outer class.", numbers, "random.py:Outer"),
        Text("The inner class counts as outer, too.", numbers, "random.py:Outer"),
        Text("Encode and decode the data of programs.", internet, "json/__init__.py:"),
    ]


def test_near_duplicates_are_found_as_by_comparing_all():
    dice, several = random.Random(0), [one + other for one in "abcd" for other in "wxyz"]
    sentences = [" ".join(dice.sample(several, dice.randint(3, 9))) for _ in range(400)]
    texts = [Text(sentence, 0, str(i)) for i, sentence in enumerate(sentences)]
    sets, expected = [], []
    for text in texts:
        found = data.words(text.sentence)
        if all(len(found & kept) < data.NEAR * len(found | kept) for kept in sets):
            sets.append(found)
            expected.append(text)
    assert data.without_near_duplicates(texts) == expected
    assert 100 < len(expected) < 300


def test_split_keeps_definitions_whole():
    texts = [
        Text(f"{label} {i}", label, f"{label}:{i // 30}") for label in range(9) for i in range(900)
    ]
    found = data.split(texts)
    assert found.definitions_on_both_sides() == 0
    for label in range(9):
        held_out = [t for t in found.held_out if t.label == label]
        assert len(held_out) == data.HELD_OUT_PER_AREA // 30 * 30
        assert sum(t.label == label for t in found.train) == data.TRAIN_PER_AREA
