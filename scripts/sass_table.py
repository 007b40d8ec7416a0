"""What docs/main_loops.md and docs/kernels.md say of our main loops, after a new record.

The table of a step of each kind of kernel is made from build/sass/ARCH.json, which
`python scripts/sass.py --record` writes, too; of a kernel with several loops the one that it is
known by (sass_rates.step_of) has the row. Figures in sentences, and the second of each pair in the
table of docs/kernels.md, are those of scripts/sass_baseline.json.

    python scripts/sass_table.py             prints the table
    python scripts/sass_table.py --write     writes all of it to the pages
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import sass_baseline
from sass_rates import RECORDED, WORDS, library, rate, shares, step_of

ROOT = Path(__file__).resolve().parents[1]
PAGE, KERNELS = ROOT / "docs" / "main_loops.md", ROOT / "docs" / "kernels.md"
TILES = ("128x256", "128x128", "128x64")
LAYOUTS = ("", " MN-major", " MN-major masked")
DECODE = tuple(f"lora_decode {rows}" for rows in (8, 16, 32, 64))
# By card; without their dtype, which is bfloat16.
ROWS = {
    "A100": (
        *(f"lora_gemm {tile}{layout}" for tile in TILES for layout in LAYOUTS),
        *(f"lora_grouped_gemm {tile}{layout}" for tile in TILES[:2] for layout in LAYOUTS),
        *(
            f"{kernel}{mask}"
            for kernel in ("lora_shrink", "lora_wgrad")
            for mask in ("", " masked")
        ),
        *("lora_dsdb 16", "lora_dsdb 32"),
        *DECODE,
    ),
    "L40S": tuple(
        f"lora_gemm {tile}{layout}" for tile in ("128x128x3", "128x64") for layout in LAYOUTS
    ),
    "H100": (
        "lora_gemm 128x256",
        *DECODE,
        *("lora_gemm_sm90a 128x256 tail 1", "lora_gemm_in_grid_sm90a 128x256 tail 1"),
        "lora_gemm_sm90a 128x192 pingpong tail 1",
        *("lora_gemm_sm90a 128x128 tail 1", "lora_gemm_sm90a 128x128 pingpong tail 1"),
    ),
}
BUILT = {"A100": "sm_80", "L40S": "sm_80", "H100": "sm_90a"}
NEEDS = ("tensor", "issue", "shared", "L2")
COLUMNS = (
    *("card", "kernel", "warps", "instructions", *NEEDS, "cycles"),
    *("of the tensor rate", "bound by", "products ahead", "copies among"),
)
TABLE = re.compile(r"(?<=\n)\| " + r" \| ".join(COLUMNS) + r" \|\n(?:\|.*\n)+")


def name_of(family: str) -> str:
    """With its dtype, where kernels have it: behind tile and schedule."""
    words = family.split()
    at = 1 + sum((word[0].isdigit() and "x" in word) or word == "pingpong" for word in words)
    return " ".join([*words[:at], "bf16", *words[at:]])


def row(card: str, family: str, loops: list[dict]) -> str:
    chosen = step_of(family, [[loop["cycles"], loop["efficiency"]] for loop in loops])
    loop = next(each for each in loops if [each["cycles"], each["efficiency"]] == chosen)
    cells = [card, family, loop["warps"], sum(loop["instructions"].values())]
    cells += [f"{loop['needs'][name]:.0f}" for name in NEEDS]
    cells += [f"{loop['cycles']:.0f}", f"{loop['efficiency']:.3f}", loop["bound"]]
    on_wgmma = "sm90a" in family  # whose operands no warp loads
    cells += ["-", "-"] if on_wgmma else [loop["products_ahead"], loop["copies_among"]]
    return "| " + " | ".join(map(str, cells)) + " |"


def table(built: dict[str, list[dict]]) -> str:
    """Of the kernels that were examined, by architecture."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for card, families in ROWS.items():
        kernels = {kernel["name"]: kernel for kernel in built[BUILT[card]]}
        loops = "consumer_loops" if card == "L40S" else "main_loops"
        lines += [row(card, each, kernels[name_of(each)][loops]) for each in families]
    return "\n".join(lines) + "\n"


def rows_of(page: str) -> list[dict[str, str]]:
    """The cells of that table in the page, the last with these columns, by column."""
    lines = TABLE.findall(page)[-1].splitlines()[2:]
    return [dict(zip(COLUMNS, line.strip("| ").split(" | "), strict=True)) for line in lines]


def least(recorded: dict, card: str, *tiles: str, masked: bool = False) -> float:
    """Of a card's tiles of lora_gemm: the lowest share."""
    section = recorded[RECORDED[card]]
    return min(rate(section, f"lora_gemm{tile}", masked) for tile in tiles)


def of_many(recorded: dict, tile: str) -> list[float]:
    """The lowest and the highest share of lora_grouped_gemm on an A100."""
    family = f"lora_grouped_gemm {tile}"
    found = shares(recorded["sm_80"], family, {False, True}, WORDS | {"float"})
    return [min(found), max(found)]


# Sentences with figures: the page, the words around them, what they are, and their digits.
SENTENCES: list[tuple[Path, str, Callable[[dict], list[float]], int]] = [
    (
        KERNELS,
        "Of many adapters: # to # with 128 x 256, # to # with 128 x 128",
        lambda recorded: [*of_many(recorded, "128x256"), *of_many(recorded, "128x128")],
        3,
    ),
    (
        KERNELS,
        "# of the library's on an A100 with 128 x 256 and 128 x 128,"
        " # on an L40S with the deep 128 x 128;"
        " on `wgmma` # with 256 columns, # with 192, # with 128",
        lambda recorded: [
            least(recorded, "A100", " 128x256", " 128x128") / library("A100"),
            least(recorded, "L40S", " 128x128x3") / library("L40S"),
            least(recorded, "H100", "_sm90a 128x256"),
            least(recorded, "H100", "_sm90a 128x192 pingpong"),
            least(recorded, "H100", "_sm90a 128x128"),
        ],
        2,
    ),
    (
        PAGE,
        "On an A100 128 x 256 and 128 x 128 reach # of the tensor rate, masked # and #.",
        lambda recorded: [
            least(recorded, "A100", " 128x256", " 128x128"),
            least(recorded, "A100", " 128x256", masked=True),
            least(recorded, "A100", " 128x128", masked=True),
        ],
        2,
    ),
    (
        PAGE,
        "is what cards with 100 KiB of shared memory take: # on an L40S",
        lambda recorded: [least(recorded, "L40S", " 128x128x3")],
        2,
    ),
]
# A row of docs/kernels.md: its figures before and now, of which the second is recorded.
ROW = re.compile(
    r"^(?P<head>\| (?P<card>A100|L40S) \| (?P<kernel>(?:deep )?128x\d+[^|]*) \|(?: [^|]+ \|){6} )"
    r"(?P<step>\w+), \d+ \| (?P<share>[\w.]+), [\d.]+(?P<tail> \|.*)$",
    re.MULTILINE,
)


def with_sentences(page: Path, text: str, recorded: dict) -> str:
    for where, words, figures, digits in SENTENCES:
        if where != page:
            continue
        pattern = re.escape(words).replace(r"\ ", r"\s+").replace(r"\#", r"([\d.]*\d)")
        [found] = re.finditer(pattern, text)
        for index, value in reversed(list(enumerate(figures(recorded), 1))):
            text = f"{text[: found.start(index)]}{value:.{digits}f}{text[found.end(index) :]}"
    return text


def with_rows(text: str, recorded: dict) -> str:
    """Of docs/kernels.md."""

    def refreshed(row: re.Match) -> str:
        family = "lora_gemm " + row["kernel"].replace("element-wise", "element")
        family = re.sub(r"deep (\S+)", r"\1x3", family)
        cycles, share = step_of(family, recorded[RECORDED[row["card"]]][family])
        step, rated = f"{row['step']}, {cycles:.0f}", f"{row['share']}, {share:.2f}"
        return f"{row['head']}{step} | {rated}{row['tail']}"

    return ROW.sub(refreshed, text)


def main() -> None:
    files = {arch: ROOT / "build" / "sass" / f"{arch}.json" for arch in BUILT.values()}
    rows = table({arch: json.loads(file.read_text()) for arch, file in files.items()})
    if "--write" not in sys.argv:
        print(rows, end="")
        return
    recorded, text = sass_baseline.read(), PAGE.read_text()
    *_, after = TABLE.finditer(text)
    text = text[: after.start()] + rows + text[after.end() :]
    PAGE.write_text(with_sentences(PAGE, text, recorded))
    text = with_rows(KERNELS.read_text(), recorded)
    KERNELS.write_text(with_sentences(KERNELS, text, recorded))


if __name__ == "__main__":
    main()
