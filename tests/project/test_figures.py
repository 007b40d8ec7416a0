"""The figures of README.md and of docs/{cpu,does-it-help,experts}.md are those of the results."""

import re
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.results import least_ratio, median_ratio
from benchmarks.shapes import MANY_ROWS
from benchmarks.whole_models.experts import MIXTURES

ROOT = Path(__file__).resolve().parents[2]
EXPERTS = ROOT / "docs" / "experts.md"
HELPS = ROOT / "docs" / "does-it-help.md"
PLACE = ROOT / "benchmarks" / "results"
PEFT, OURS = "peft_default", "peft_default_accelerated"
# The README's rows: file of results, its part, the row there.
SHOWN = [
    ("xeon-amx-2-cores/models", "cases", "Llama all linear bfloat16"),
    ("xeon-avx512-2-cores/whole_models", "cases", "Llama all linear bfloat16"),
    ("xeon-avx512-2-cores/nf4", "cases", "Llama all linear nf4"),
    ("xeon-avx512-2-cores/models_135m", "cases", "Llama 135M all linear bfloat16"),
    ("xeon-amx-2-cores/experts", "experts", "Qwen3-30B-A3B's layer, 1 token"),
]


def cells_of(page: Path, heads: str) -> list[list[str]]:
    """The rows of the table with these heads."""
    table = page.read_text().partition(f"| {heads} |")[2].partition("\n\n")[0]
    return [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def experts_of(machine: str) -> list[list[str]]:
    """The rows of a report's table of experts, without the quartiles, in the page's words."""
    text = (PLACE / machine / "experts" / "report.md").read_text().partition("\n| model, work")[2]
    for m in MIXTURES:
        depth = f", {m.layers} layers" if m.layers > 1 else ""
        text = text.replace(f"{m.name}, 1 ", f"{m.experts} x ({m.hidden}, {m.inner}){depth}, 1 ")
        text = re.sub(rf"{m.name}, (\w+), 1024 tokens", r"\1 of 1024", text)
    lines = text.partition("\n\n")[0].splitlines()[2:]
    return [
        [re.sub(r" +\(\S+\) *$", "", c).strip() for c in line.split("|")[1:-1]] for line in lines
    ]


def test_the_page_on_experts_has_the_reports_rows():
    heads = "model, work | frozen | PEFT, bfloat16 | accelerated | PEFT, default | accelerated"
    shown = cells_of(EXPERTS, f"{heads} | peak: PEFT, accelerated")
    measured = experts_of("xeon-amx-2-cores")
    for own, (work, frozen, *ratios, peak, ours, _, _) in zip(shown, measured, strict=True):
        digits = [len(value.partition(".")[2]) for value in own[2:6]]
        ratios = [f"{float(value):.{n}f}" for value, n in zip(ratios[:4], digits, strict=True)]
        time, unit, rest = frozen.partition(" ms")
        frozen = f"{float(time):.0f}{unit}{rest}"
        assert own == [work, frozen, *ratios, f"{peak}, {ours}" if peak else ""]


def test_the_page_on_experts_says_what_was_missed():
    def accelerated(machine, work):
        found = [row for row in experts_of(machine) if work in row[0]]
        return sorted(float(row[column]) for row in found for column in (3, 5))

    page = " ".join(EXPERTS.read_text().split())
    *_, forward = accelerated("xeon-amx-2-cores", "forward")
    assert f"by {forward - 1.0:.2f} one forward with PEFT's defaults" in page
    (low, *_, high), (least, *_, most) = (
        accelerated("xeon-avx512-2-cores", work) for work in ("forward", "step")
    )
    assert f"forwards {low:.2f} to {high:.2f}, steps {least:.2f} to {most:.2f}." in page


def document(name: str) -> results.Document:
    return results.read(PLACE / name / "results.json")


def test_the_readme_has_the_times_and_peaks_that_were_measured():
    heads = "model | processor | PEFT, ms | with lora_ext, ms | faster | memory, MiB"
    rows = cells_of(ROOT / "README.md", heads)
    for (name, part, which), row in zip(SHOWN, rows, strict=True):
        [found] = [one for one in document(name)[part] if one["id"] == which]
        times = [found["timing"][variant]["ms"] for variant in (PEFT, OURS)]
        digits = [len(cell.partition(".")[2]) for cell in row[2:4]]
        assert row[2:4] == [f"{ms:.{n}f}" for ms, n in zip(times, digits, strict=True)]
        faster = results.median_ratio(found, PEFT, OURS)
        assert faster is not None
        assert row[4] == f"{faster:.{1 if faster < 10 else 0}f}x"
        if row[5]:
            peaks = [found["memory"][variant]["peak"] / 2**20 for variant in (PEFT, OURS)]
            assert row[5] == " -> ".join(f"{peak:.0f}" for peak in peaks)


def test_the_tokens_of_a_whole_run_are_those_measured():
    heads = "dropout | PEFT, tokens/s | with lora_ext | faster"
    shown = cells_of(HELPS, heads + " | loss after 30 steps")
    runs = document("xeon-amx-2-cores/runs")["runs"]
    for found, row in zip(runs, shown, strict=True):
        speeds = [1000 * found["tokens"] / found["timing"][each]["ms"] for each in (PEFT, OURS)]
        faster = results.median_ratio(found, PEFT, OURS)
        assert row[1:4] == [*(f"{speed:.0f}" for speed in speeds), f"{faster:.2f}x"]
        assert row[4] == ", ".join(f"{found['losses'][each][-1]:.3f}" for each in (PEFT, OURS))
    less = []
    for found in document("epyc-avx512-2-cores/runs")["runs"]:
        peaks = [found["memory"][each]["peak"] / 2**20 for each in (PEFT, OURS)]
        less.append(f"{100 - 100 * peaks[1] / peaks[0]:.0f} % less")
        said = "{:.0f} -> {:.0f} MiB, ".format(*peaks) + less[-1]
        assert said in HELPS.read_text()
    assert f"{less[-1]} memory (on an EPYC)" in (ROOT / "README.md").read_text()
    said = f"**{shown[-1][2]} tokens a second instead of {shown[-1][1]}**"
    assert said in " ".join((ROOT / "README.md").read_text().split())


@pytest.mark.parametrize(
    ("machine", "kernels"),
    [
        ("xeon-amx-2-cores", "AMX"),
        ("epyc-avx512-2-cores", "AVX512_BF16"),
        ("epyc-zen5-2-cores", "AVX512_BF16, Zen 5"),
    ],
)
def test_layers_of_many_rows_take_what_was_measured(machine, kernels):
    heads = f"{kernels}: rows | in -> out | merged, packed | forward | target | step | target"
    heads += " | step, PEFT"
    cells = document(f"{machine}/many_rows")["cells"]
    shown = cells_of(ROOT / "docs" / "cpu.md", heads)
    assert len(shown) == len(MANY_ROWS)
    for row, (size, limits) in zip(shown, MANY_ROWS.items(), strict=True):
        assert f"{row[0]} {row[1]}" == "{} {} -> {}".format(*size)
        fields = dict(zip(("rows", "in_features", "out_features"), size, strict=True))
        forward, step = (one for one in cells if fields.items() <= one["cell"].items())
        pairs = [(forward, "merged_packed", "merged"), (step, "peft", "frozen")]
        assert [row[2], row[7]] == [f"{results.median_ratio(*pair):.2f}" for pair in pairs]
        for at, one, floor, limit in ((3, forward, "merged", 0), (5, step, "frozen", 1)):
            found = (ratio(one, "ours", floor) for ratio in (median_ratio, least_ratio))
            assert row[at] == "{:.2f} ({:.2f})".format(*found)
            assert row[at + 1] == f"{limits[kernels != 'AMX'][limit]:.2f}"


def gain(name: str, **cell: object) -> str:
    """PEFT's time over ours."""
    [found] = [one for one in document(name)["cells"] if cell.items() <= one["cell"].items()]
    ratio = results.median_ratio(found, "peft", "ours")
    assert ratio is not None
    return f"{ratio:.2f}"


def test_the_gains_of_training_are_those_measured():
    heads = "layer (in x out) | base | tokens | dropout | PEFT's time over ours"
    for size, base, rows, dropout, shown in cells_of(HELPS, heads):
        cell = {"mode": "step", "dtype": base, "rows": int(rows), "rank": 16}
        cell |= {"in_features": int(size.split()[0]), "out_features": int(size.split()[-1])}
        cell["dropout_p"] = 0.0 if dropout == "none" else float(dropout)
        assert gain("xeon-amx-2-cores/headline", **cell) == shown, size


def test_the_gains_of_inference_are_those_measured():
    heads = "layer | base | tokens | rank 8 | rank 16 | rank 64"
    for size, base, rows, *shown in cells_of(HELPS, heads):
        cell = {"dtype": base, "rows": int(rows), "in_features": int(size.split()[0])}
        ranks = [gain("xeon-amx-2-cores/few_rows", **cell, rank=rank) for rank in (8, 16, 64)]
        assert ranks == shown, size
