"""The figures that README.md and docs/experts.md tell of experts are those of the results."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "benchmarks/results/xeon-avx512-2-cores/experts/report.md"
PAGE = ROOT / "docs" / "experts.md"


def rows(text: str) -> list[list[str]]:
    """The cells of each row of tables on experts, without the quartiles."""
    lines = re.findall(r"^\| (?:.*1 token|.*of 1024|.*1024 tokens) +\|.*$", text, re.M)
    return [[re.sub(r" *\(.*", "", c).strip() for c in line.split("|")[2:-1]] for line in lines]


def test_the_page_on_experts_has_the_reports_ratios():
    found, measured = rows(PAGE.read_text()), rows(REPORT.read_text())
    assert len(found) == len(measured) == 9
    for own, theirs in zip(found, measured, strict=True):
        digits = [len(value.partition(".")[2]) for value in own[1:5]]
        assert own[1:5] == [
            f"{float(value):.{n}f}" for value, n in zip(theirs[1:5], digits, strict=True)
        ]


# What the README tells, and how its numbers are found.
TOLD = [
    (
        r"a token takes PEFT (\S+) times .*?accelerated (\S+) times; "
        r"a training step (\S+) and (\S+) \(",
        lambda: [*rows(REPORT.read_text())[6][1:3], *rows(REPORT.read_text())[8][1:3]],
    ),
    (r"takes (\S+) to (\S+) of the merged layer's time", lambda: extremes("bfloat16, rows")),
]


def extremes(head: str) -> list[str]:
    """The least and the most of the forward's column in a table of docs/cpu.md."""
    table = (ROOT / "docs" / "cpu.md").read_text().partition(f"| {head} |")[2].partition("\n\n")[0]
    values = [line.split("|")[3].strip() for line in table.splitlines()[2:]]
    return [min(values, key=float), max(values, key=float)]


@pytest.mark.parametrize(("sentence", "measured"), TOLD, ids=["experts", "one pass"])
def test_the_readme_tells_what_was_measured(sentence, measured):
    found = re.search(sentence, " ".join((ROOT / "README.md").read_text().split()))
    assert found is not None, "the sentence is written otherwise now: change the pattern with it"
    digits = [len(value.partition(".")[2]) for value in found.groups()]
    wanted = [f"{float(v):.{n}f}" for v, n in zip(measured(), digits, strict=True)]
    assert list(found.groups()) == wanted
