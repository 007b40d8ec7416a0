"""The package in emulation: its own tests, and what it does about kernels that are wrong."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from emulator.package import build

pytestmark = pytest.mark.kernels

# Tests of the op, which run as on CUDA, each file at a time.
SUITES = {
    "test_numerics.py": 120,
    "test_autograd.py": 100,
    "test_shapes.py": 200,
    "test_dropout.py": 60,
    "test_registration.py": 100,
    "test_peer_bugs.py": 60,
}
# On Hopper's lora_gemm, whose wgmma takes the execution layer longer.
ON_HOPPER = ("test_numerics.py", "test_autograd.py", "test_dropout.py", "test_peer_bugs.py")

CALL = """
import os, sys, warnings
import torch, lora_ext
from lora_ext import _C
from lora_ext.kernel_plan import explain_cuda_call

def call():
    torch.manual_seed(0)
    x = torch.randn(70, 96, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(136, 96, dtype=torch.bfloat16)
    a = (0.1 * torch.randn(16, 96)).requires_grad_()
    b = (0.1 * torch.randn(136, 16)).requires_grad_()
    y = lora_ext.lora_linear(x, w, a, b, None, 2.0, 0.1)
    y.sum().backward()
    plan = explain_cuda_call(x.detach(), w, a.detach(), b.detach(), 0.1)
    return (y.detach(), x.grad, a.grad, b.grad), plan

def library():
    _C.set_cuda_route("library")
    results, _ = call()
    _C.set_cuda_route("auto")
    return results

def same(first, second):
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
"""


@pytest.fixture(scope="module", autouse=True)
def package():
    return build.make()


def python(code: str, **environment: str) -> str:
    done = build.run(["-c", CALL + code], LORA_EXT_EMULATED_ARCH="80", **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(("arch", "route"), [("80", "kernel"), ("80", "hybrid"), ("90", "kernel")])
def test_the_tests_of_the_op_pass_on_the_kernels(arch, route):
    environment = {"LORA_EXT_EMULATED_ARCH": arch, "LORA_EXT_EMULATED_ROUTE": route}

    def run(suite: str):
        words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{suite}"]
        return suite, build.run(words, **environment)

    with ThreadPoolExecutor(2) as pool:
        for suite, done in pool.map(run, ON_HOPPER if arch == "90" else SUITES):
            assert done.returncode == 0, f"{suite}\n{done.stdout[-3000:]}"
            passed = int(re.search(r"(\d+) passed", done.stdout)[1])
            assert passed >= SUITES[suite], suite


def test_kernels_run_and_differ_from_the_library_by_rounding():
    python("""
results, plan = call()
assert plan.forward_check == plan.backward_check == "passed", plan
expected = library()
assert not same(results, expected)  # another order of rounding: the kernels ran
for got, wanted in zip(results, expected):
    assert (got - wanted).abs().max() <= 2**-6 * wanted.abs().max()
again, _ = call()
assert same(again, results)
""")


@pytest.mark.parametrize("fault", ["reduce.splits:low", "shrink.steps:low", "store.rows:low"])
def test_a_wrong_kernel_is_found_and_not_used(fault):
    said = python(
        """
results, plan = call()
assert plan.forward_check not in ("passed", "not yet"), plan
os.environ["LORA_EXT_EMULATED_FAULT"] = ""
assert same(results, library())
results, _ = call()
assert same(results, library())  # not even once the fault is gone
print(plan)
""",
        LORA_EXT_EMULATED_FAULT=fault,
    )
    assert said.count("failed their check") >= 1 and "the library route is" in said
    assert "check on this device: " in said


def test_a_first_use_under_capture_takes_the_library_route():
    python(
        """
results, plan = call()
assert plan.forward_check == plan.backward_check == "not yet"
assert same(results, library())
os.environ["LORA_EXT_EMULATED_CAPTURE"] = "0"
call()
os.environ["LORA_EXT_EMULATED_CAPTURE"] = "1"
results, plan = call()
assert plan.forward_check == plan.backward_check == "passed"
assert not same(results, library())
""",
        LORA_EXT_EMULATED_CAPTURE="1",
    )


@pytest.mark.parametrize("arch", ["80", "86"])
def test_warmup_checks_everything_and_draws_nothing(arch):
    python(
        """
before = torch.get_rng_state()
assert lora_ext.warmup("cpu") == []
assert torch.equal(torch.get_rng_state(), before)
_, plan = call()
os.environ["LORA_EXT_EMULATED_FAULT"] = "reduce.splits:low"  # which no check sees any more
assert lora_ext.warmup("cpu") == []
""".replace("80", arch),
    )


def test_warmup_names_the_kernels_that_failed():
    said = python(
        'print(*lora_ext.warmup("cpu"), sep="\\n")', LORA_EXT_EMULATED_FAULT="mask.kept_low:never"
    )
    lines = [line for line in said.splitlines() if line.startswith(("forward", "backward"))]
    assert lines and all("dropout" in line for line in lines)


def test_misaligned_operands_take_the_element_wise_kernels():
    python("""
x = torch.randn(70, 97, dtype=torch.bfloat16)[:, 1:]
w = torch.randn(136, 96, dtype=torch.bfloat16)
a, b = torch.randn(16, 96), torch.randn(136, 16)
y = lora_ext.lora_linear(x, w, a, b)
expected = lora_ext.lora_linear(x.contiguous(), w, a, b)
plan = explain_cuda_call(x, w, a, b, 0.0)
assert "element-wise" in str(plan.forward) and plan.forward_check == "passed", plan
assert torch.equal(y, expected)
""")


def test_a_transposed_weight_takes_the_hybrid_route():
    python("""
x, w = torch.randn(70, 96, dtype=torch.bfloat16), torch.randn(96, 136, dtype=torch.bfloat16).t()
a, b = torch.randn(16, 96), torch.randn(136, 16)
plan = explain_cuda_call(x, w, a, b, 0.0)
y = lora_ext.lora_linear(x, w, a, b)
assert plan.forward.hybrid and "element-wise" not in str(plan.forward), plan
expected = lora_ext.lora_linear(x.float(), w.float(), a, b)
assert (y.float() - expected).abs().max() <= 2**-6 * expected.abs().max()
""")


def test_a_launch_that_fails_is_an_error_of_the_call():
    python("""
call()
os.environ["LORA_EXT_EMULATED_FAULT"] = "shrink.commit"  # found when the block ends
try:
    call()
except RuntimeError as error:
    assert "lora_ext.lora_linear: launching the kernels on cpu failed: " in str(error), error
else:
    raise AssertionError("no error")
os.environ["LORA_EXT_EMULATED_FAULT"] = ""
call()
""")


TUNE = """
from pathlib import Path
from lora_ext import tune
shape = tune.Shape(70, 96, 136, 16, True, True)
path = Path({path!r})
table = tune.tune([shape], "cpu", path=path, rounds=3)
assert tune.read_table(path) == table
forward, backward = table.entries
"""


def test_tuning_times_every_route_and_the_planner_goes_by_it(tmp_path):
    python(
        TUNE.format(path=str(tmp_path / "table.json"))
        + """
tiles = {"kernel 128 x 256", "kernel 128 x 128", "kernel 128 x 64"}
assert set(forward.us) == {"library", "hybrid"} | tiles, forward
assert set(backward.us) == {"library", "hybrid"} | tiles - {"kernel 128 x 256"}, backward
_, plan = call()
assert "fastest as measured on emulated sm_80" in str(plan), plan
won = tune.Entry(shape, False, "kernel", "128 x 128", {})
tune.write_table(table.with_entries([won]), path)
from lora_ext.tune import tables
tables.install([tune.read_table(path)])
results, plan = call()
assert plan.forward.tile == "128 x 128" and not plan.forward.hybrid, plan
assert not same(results, library())
"""
    )


def test_kernels_that_fail_their_check_cannot_win(tmp_path):
    said = python(
        TUNE.format(path=str(tmp_path / "table.json"))
        + 'assert set(forward.us) == {"library"} and forward.route == "library", forward',
        LORA_EXT_EMULATED_FAULT="shrink.steps:low",
    )
    assert "failed their check" in said


TILES = """
from lora_ext.tune import Entry, Shape, tables
card = _C.cuda_card(torch.device("cpu"))
expected = library()
for tile in _C.tiles_of(card, backward=True, float_adapters=True, dropout=True):
    won = [Entry(Shape(70, 96, 136, 16, True, True), back, "kernel", tile, {}) for back in (0, 1)]
    tables.install([tables.empty_table(card.name).with_entries(won)])
    results, plan = call()
    assert plan.forward.tile == plan.backward.tile == tile, plan
    assert plan.forward_check == plan.backward_check == "passed", plan
    for got, wanted in zip(results, expected):
        assert (got - wanted).abs().max() <= 2**-6 * wanted.abs().max()
    print(tile)
"""


def test_every_tile_of_hopper_agrees_with_the_library():
    done = build.run(["-c", CALL + TILES], LORA_EXT_EMULATED_ARCH="90")
    assert done.returncode == 0, done.stderr
    tiles = done.stdout.splitlines()
    assert "wgmma 128 x 256" in tiles and "pingpong 128 x 192" in tiles and len(tiles) == 6
