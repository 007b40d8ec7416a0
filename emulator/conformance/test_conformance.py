"""The execution layer against what GPUs returned, and proof that the comparison can fail.

conformance.cu executes every function of csrc/ptx/ with random operands. Compiled for the execution
layer it runs here; golden/ has what GPUs wrote.
"""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from emulator import build
from emulator.conformance import produce, vectors
from emulator.cuda_headers import nvcc
from emulator.oracles.oracle_tools import functions_of_headers

pytestmark = pytest.mark.kernels

GOLDEN = sorted(produce.GOLDEN.glob("*.json"))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """conformance.cu, compiled for the execution layer."""
    return produce.compile_cases_for_emulator(tmp_path_factory.mktemp("conformance") / "cases.o")


@pytest.fixture(scope="module")
def program(cases: Path) -> Path:
    return produce.link_for_emulator(
        [cases, *produce.library().values()], cases.parent / "conformance"
    )


@pytest.fixture(scope="module")
def ours(program: Path) -> vectors.Vectors:
    """What the execution layer returns, with the operands."""
    return vectors.load(produce.run(program, program.parent / "inputs.json", "--inputs"))


@pytest.fixture
def golden(ours: vectors.Vectors) -> vectors.Vectors:
    """The execution layer's own vectors in the place of a GPU's, to be corrupted."""
    return copy.deepcopy(ours)


def test_every_function_has_a_case(ours):
    assert ours.functions == functions_of_headers()


def test_products_are_those_of_numpy(ours):
    """Not a comparison with a GPU: that the layer's results, and the bound, make sense."""
    products = {name: case for name, case in ours.cases.items() if "d" in case.outputs}
    assert len(products) > 40
    for name, case in products.items():
        exact, _ = vectors.reference(name, case)
        if case.comparison == "exact":
            assert np.array_equal(case.outputs["d"].data, exact), name
        else:
            d = case.outputs["d"].data
            assert not vectors.product_differences(name, case, d, "our")


def test_a_program_that_ends_early_has_named_its_case_and_kept_those_before(program, tmp_path):
    """It is killed as soon as it names its twentieth case, as a hang would let it be."""
    target = tmp_path / "vectors.json"
    with subprocess.Popen([program, target], stdout=subprocess.PIPE, text=True) as running:
        names = [running.stdout.readline().strip() for _ in range(20)]
        running.kill()
    kept = list(vectors.load(target).cases)
    assert kept[:19] == names[:19] and len(set(names)) == 20


# Stands between the test and the program: it ends at one case as a trap does, hangs at another.
FAULTY = """#!{python}
import os, subprocess, sys, time
with subprocess.Popen([{program!r}, *sys.argv[1:]], stdout=subprocess.PIPE, text=True) as running:
    for line in running.stdout:
        if line.strip() in ("atomics", "cluster"):
            running.kill()
            print(line, end="", flush=True)
            if line.strip() == "cluster":
                time.sleep(60)
            sys.exit(2)
        print(line, end="", flush=True)
"""


def test_a_case_that_traps_or_hangs_costs_itself_alone(program, ours, tmp_path):
    faulty, target = tmp_path / "faulty", tmp_path / "vectors.json"
    faulty.write_text(FAULTY.format(python=sys.executable, program=str(program)))
    faulty.chmod(0o755)
    assert produce.run_cases(faulty, target, seconds=5) == ["atomics", "cluster"]
    assert list(vectors.load(target).cases) == [
        name for name in ours.cases if name not in ("atomics", "cluster")
    ]


@pytest.mark.parametrize("schedule", range(2, 11))
def test_no_schedule_changes_the_file(program, ours, schedule):
    path = produce.run(program, program.parent / f"{schedule}.json", "--schedule", str(schedule))
    again = vectors.load(path)
    assert again.cases.keys() == ours.cases.keys()
    for name, case in again.cases.items():
        for key, array in case.outputs.items():
            assert array.hash == ours.cases[name].outputs[key].hash, f"{name}: {key}"


@pytest.mark.skipif(not GOLDEN, reason="no GPU vectors yet: no GPU has executed the cases")
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_conforms_to_gpu(ours, path):
    golden = vectors.load(path)
    assert golden.producer["kind"] == "gpu"
    assert not vectors.compare(ours, golden)


def test_says_what_no_gpu_has_shown(capsys):
    """Passes; prints the functions that rest on the oracles and the ISA's text alone."""
    shown = {name for path in GOLDEN for name in vectors.load(path).functions}
    missing = sorted(functions_of_headers() - shown)
    with capsys.disabled():
        if not GOLDEN:
            print(f"\nno GPU vectors yet: {len(missing)} functions without evidence")
        elif missing:
            print(f"\n{len(missing)} functions without GPU vectors: {', '.join(missing)}")
    assert len(missing) <= len(functions_of_headers())


@pytest.mark.parametrize("compute_capability", [80, 90])
def test_compiles_for_gpus(tmp_path, compute_capability):
    if nvcc() is None:
        pytest.skip("the device build needs nvcc: put it on PATH or its toolkit in CUDA_HOME")
    produce.build_for_gpu(tmp_path / "conformance", compute_capability)


# ---- the comparison itself ----


def corrupt(array: vectors.Array, data: np.ndarray) -> None:
    array.data, array.hash = data, vectors.fnv1a(data.tobytes())


def test_equal_vectors_conform(ours, golden):
    assert vectors.compare(ours, golden) == []


def test_one_flipped_bit_is_seen_in_every_exact_output(ours, golden):
    for name, case in golden.cases.items():
        if case.comparison != "exact":
            continue
        for key, array in case.outputs.items():
            right = array.data
            flipped = right.copy()
            flipped.view(f"u{right.itemsize}").flat[right.size // 2] ^= 1
            corrupt(array, flipped)
            [difference] = vectors.case_differences(name, ours.cases[name], case)
            assert f"{name}: {key}" in difference and f"(1 of {right.size} differ)" in difference
            corrupt(array, right)


def test_products_may_differ_within_the_bound_alone(ours, golden):
    for name, case in golden.cases.items():
        if case.comparison != "product":
            continue
        exact, bound = vectors.reference(name, ours.cases[name])
        array = case.outputs["d"]
        for factor, wrong in [(0.9, False), (1.1, True), (float("nan"), True)]:
            d = exact.astype(np.float32)
            d.flat[7] = exact.flat[7] + factor * bound.flat[7]
            corrupt(array, d)
            assert bool(vectors.case_differences(name, ours.cases[name], case)) == wrong


def test_missing_and_unknown_cases_are_seen(ours, golden):
    golden.cases["imagined"] = golden.cases.pop("cluster")
    assert {line.partition(":")[0] for line in vectors.compare(ours, golden)} == {
        "cluster",
        "imagined",
    }


def test_an_older_gpu_lacks_the_cases_of_sm90(ours, golden):
    golden.producer["compute_capability"] = 80
    for name, case in ours.cases.items():
        if case.architecture > 80:
            del golden.cases[name]
    assert 10 < len(golden.cases) < len(ours.cases)
    assert vectors.compare(ours, golden) == []
    del golden.cases["atomics"]
    assert vectors.compare(ours, golden) == ["atomics: missing in the GPU's file"]


@pytest.mark.parametrize(
    ("part", "name", "words"),
    [("inputs", "in", "the operand in is another one"), ("outputs", "counters", "damaged")],
)
def test_other_operands_and_damaged_outputs_are_seen(ours, golden, part, name, words):
    getattr(golden.cases["atomics"], part)[name].hash = "0" * 16
    [difference] = vectors.compare(ours, golden)
    assert words in difference


def test_other_shapes_are_seen(ours, golden):
    array = golden.cases["atomics"].outputs["counters"]
    corrupt(array, array.data[:2])
    array.shape = (2,)
    [difference] = vectors.compare(ours, golden)
    assert "write its file anew" in difference


DAMAGES = {
    "version": ('"version": 1', '"version": 2'),
    "format": ("lora_ext conformance vectors", "other vectors"),
    "key": ('"functions"', '"function"'),
    "comparison": ('"comparison": "exact"', '"comparison": "roughly"'),
    "shape": ('"shape": [96]', '"shape": [95]'),
    "syntax": ('"cases": [', '"cases": '),
}


@pytest.mark.parametrize(("right", "wrong"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_files_are_refused(program, tmp_path, right, wrong):
    path = produce.run(program, tmp_path / "vectors.json")
    text = path.read_text()
    assert right in text
    path.write_text(text.replace(right, wrong, 1))
    with pytest.raises(vectors.VectorsError, match=r"vectors\.json"):
        vectors.load(path)


def test_a_wrong_layer_fails(ours, cases, tmp_path):
    """A layer that is wrong about one fragment, where `ours` takes the GPU's place."""
    layouts = (build.EMULATOR / "matrix" / "layouts.h").read_text()
    right, wrong = "at.col + 8 * (reg / 2)", "at.col + 8 * (1 - reg / 2)"
    assert layouts.count(right) == 1
    folder = tmp_path / "emulator" / "matrix"
    folder.mkdir(parents=True)
    (folder / "layouts.h").write_text(layouts.replace(right, wrong))
    source = build.EMULATOR / "matrix" / "mma.cpp"
    mma = produce.compile_for_emulator(source, tmp_path / "mma.o", f"-I{tmp_path}")
    objects = [cases, *{**produce.library(), build.from_root(source): mma}.values()]
    program = produce.link_for_emulator(objects, tmp_path / "wrong")
    layer = vectors.load(produce.run(program, tmp_path / "wrong.json", "--inputs"))
    differing = {line.partition(":")[0] for line in vectors.compare(layer, ours)}
    assert differing == {name for name in ours.cases if "mma_m16n8k16" in name and "int" in name}
