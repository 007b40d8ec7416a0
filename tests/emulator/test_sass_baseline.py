"""scripts/sass_baseline.py: what is recorded of main loops, by which counter, and what is worse."""

import sys

import pytest

from emulator import build

sys.path.insert(0, str(build.ROOT / "scripts"))
import sass_baseline
import sass_kernels
import sass_main_loops

pytestmark = pytest.mark.kernels

NAMES = {
    name: ["Name", ["ctx", [context]], ["id", f"'{name}'"]]
    for name, context in (("a", "Store"), ("b", "Load"))
}
SLICE = ["Slice", ["upper", ["Constant", ["value", "1"]]]]
ASSIGNED = [
    "Assign",
    ["targets", [NAMES["a"]]],
    ["value", ["Subscript", ["ctx", ["Load"]], ["slice", SLICE], ["value", NAMES["b"]]]],
]


def kernel(name="lora_gemm 128x64 bf16", efficiencies=(0.8, 0.6)):
    loops = [
        sass_main_loops.MainLoop(
            f"{at}0-{at}8", {}, 2, {"tensor": 100.0}, 100 / each, each, "x", 0, 0
        )
        for at, each in enumerate(efficiencies, 1)
    ]
    return sass_kernels.Kernel(name, "sm_80", 128, 78848, main_loops=loops)


def test_a_main_loop_that_is_slower_than_recorded():
    before = sass_baseline.recorded([kernel("lora_gemm 128x64 fp16"), kernel(), kernel("x", ())])
    assert before == {"lora_gemm 128x64": [[125.0, 0.8], [100 / 0.6, 0.6]]}
    compared = sass_baseline.compared
    assert compared([kernel(), kernel("lora_gemm 128x64 fp16")], before) == []
    assert compared([kernel(efficiencies=(0.78, 0.95))], before) == []
    for name in ("lora_gemm 128x64 bf16", "lora_gemm 128x64 fp16"):
        [line] = compared([kernel(name, (0.8, 0.58))], before)
        assert line == (
            f"{name}: the loop at 20-28 takes 172 cycles a step, 0.580 of the tensor rate;"
            " 167 and 0.600 recorded"
        )
    gone = kernel(efficiencies=())
    for other in (kernel(efficiencies=(0.8,)), kernel("lora_gemm 128x128 bf16"), gone):
        [line] = compared([other], before)
        assert "other main loops than recorded" in line
    assert compared([kernel("lora_reduce bf16", ())], before) == []


def test_a_main_loop_that_is_slower_on_an_l40s():
    on_both = kernel()
    on_both.consumer_loops = kernel(efficiencies=(0.7,)).main_loops
    before = sass_baseline.recorded([on_both], consumer=True)
    assert before == {"lora_gemm 128x64": [[100 / 0.7, 0.7]]}
    assert sass_baseline.compared([on_both], before, consumer=True) == []
    on_both.consumer_loops = kernel(efficiencies=(0.6,)).main_loops
    [line] = sass_baseline.compared([on_both], before, consumer=True)
    assert line.startswith("lora_gemm 128x64 bf16 on an L40S: the loop at 10-18 takes 167 cycles")
    on_both.consumer_loops = []
    [line] = sass_baseline.compared([on_both], before, consumer=True)
    assert "on an L40S: other main loops than recorded" in line


def test_float16_has_a_line_where_it_differs():
    half = kernel("lora_gemm 128x64 fp16", (0.8, 0.5))
    before = sass_baseline.recorded([half, kernel()])
    assert before == {
        "lora_gemm 128x64": [[125.0, 0.8], [100 / 0.6, 0.6]],
        "lora_gemm 128x64 fp16": [[125.0, 0.8], [200.0, 0.5]],
    }
    assert sass_baseline.compared([half, kernel()], before) == []
    [line] = sass_baseline.compared([kernel("lora_gemm 128x64 bf16", (0.8, 0.5))], before)
    assert "0.600 recorded" in line


def test_what_is_recorded_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sass_baseline, "FILE", tmp_path / "baseline.json")
    sass_baseline.record("13.0.88", {"sm_80": [kernel()], "sm_90a": [kernel("y bf16", (0.9,))]})
    found = sass_baseline.read()
    assert found["nvcc"] == "13.0.88" and found["sm_90a"] == {"y": [[100 / 0.9, 0.9]]}
    assert found["kernels"] == {"sm_80": 1, "sm_90a": 1}
    assert sass_baseline.compared([kernel()], found["sm_80"]) == []
    assert sass_baseline.stale() == []
    monkeypatch.setattr(sass_baseline, "counter", lambda: "another")
    assert sass_baseline.stale() == [
        "recorded with another counter: python scripts/sass.py --record"
    ]


def test_the_counter_is_the_one_that_recorded():
    assert sass_baseline.stale() == []


def test_a_counter_is_known_by_its_code():
    source = '''"""What it does."""
QUEUE = 5  # instructions [4]

def cycles(of: str, *, least: int = 2) -> float:
    """Of the pipe."""
    return max(least, {"a": [1.0, None]}[of][0])
'''
    counter_of = sass_baseline.counter_of
    before = counter_of([source])
    for was, other in (
        ("What it does.", "What else."),
        ("  # instructions [4]", ""),
        ("Of the pipe.", "Of pipes."),
        ("(of: str, *, least: int = 2)", "(\n    of: str, *, least: int = 2\n)"),
    ):
        assert was in source and counter_of([source.replace(was, other)]) == before
    for was, other in (
        ("QUEUE = 5", "QUEUE = 6"),
        ("least: int = 2", "least: int = 3"),
        ("1.0, None", "1.0, 0"),
        ("1.0", "1"),
        ("max(", "min("),
        ("[0])", "[1])"),
    ):
        assert was in source and counter_of([source.replace(was, other)]) != before
    assert counter_of([source, "A = 1"]) != counter_of(["A = 1", source])
    # The same for every Python: the fields of 3.10 that are not empty, by name.
    assert sass_baseline.plain(sass_baseline.ast.parse("a = b[:1]")) == [
        "Module",
        ["body", [ASSIGNED]],
    ]
