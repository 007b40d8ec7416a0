"""The package in emulation: its own tests, and what it does about kernels that are wrong."""

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from emulated.package import build
from emulated.package.child import python

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("package")]

# Tests of the op and of experts by it, which run as on CUDA, two files at a time and the longest
# first, and how many of each file pass at least.
SUITES = {
    "op/test_numerics.py": 110,
    "op/test_peer_bugs.py": 60,
    "op/test_registration.py": 90,
    "op/test_shapes.py": 100,
    "op/test_lora_update.py": 150,
    "op/test_autograd.py": 100,
    "op/test_derivatives.py": 40,
    "op/test_dropout.py": 60,
    "op/test_many_adapters.py": 250,
    **build.EXPERTS_TESTS,
    "op/test_many_random.py": 1,
}
# By the library's base product, with which all but that is as without.
ON_HYBRID = (
    "op/test_numerics.py",
    "op/test_shapes.py",
    "op/test_lora_update.py",
    "op/test_autograd.py",
)
# On Hopper's lora_gemm, whose wgmma takes the execution layer longer.
ON_HOPPER = (
    "op/test_numerics.py",
    "op/test_peer_bugs.py",
    "op/test_lora_update.py",
    "op/test_autograd.py",
    "op/test_dropout.py",
)
# Left to the night: what takes no kernel, one of four pairs of types, every second rank, calls that
# look for a leak, and numbers of torch's threads, which run no kernel.
BY_DAY = ("-k", "not (f64-f64 or f16-f32 or 2+4 or 3+4 or memory_is_flat or number_of_threads)")


# Of the op as torch sees it, which hardly runs a kernel.
AT_NIGHT = {"op/test_registration.py", "op/test_derivatives.py"}


# By day 8.0 alone: the hybrid route and Hopper's kernels have tests of their own, also with cuda/.
@pytest.mark.parametrize(
    ("arch", "route"),
    [
        ("80", "kernel"),
        pytest.param("80", "hybrid", marks=pytest.mark.nightly),
        pytest.param("90", "kernel", marks=pytest.mark.nightly),
    ],
)
def test_the_tests_of_the_op_pass_on_the_kernels(arch, route, seeds):
    environment = {"LORA_EXT_EMULATED_ARCH": arch, "LORA_EXT_EMULATED_ROUTE": route}

    def run(suite: str):
        words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{suite}"]
        return suite, build.run([*words, *seeds.choose(BY_DAY, ())], **environment)

    suites = ON_HOPPER if arch == "90" else ON_HYBRID if route == "hybrid" else SUITES
    suites = [each for each in suites if each not in seeds.choose(AT_NIGHT, ())]
    with ThreadPoolExecutor(2) as pool:
        for suite, done in pool.map(run, suites):
            assert done.returncode == 0, f"{suite}\n{done.stdout[-3000:]}"
            passed = int(re.search(r"(\d+) passed", done.stdout)[1])
            assert passed >= SUITES[suite], suite


def symbols(objects: list, which: str) -> set[str]:
    """Of lora_ext::cuda, that objects define or not."""
    command = ["nm", which, *(str(each.path) for each in objects)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r" (_ZN8lora_ext4cuda\w+)$", listed, re.M))


def test_a_build_without_cuda_has_all_that_is_asked_of_a_device():
    none = build.programs.Object(build.FLAVOUR, build.NO_CUDA, kernels=False)
    none.compile()
    half = build.torchs_half()
    asked = symbols(half, "--undefined-only") - symbols(half, "--defined-only")
    assert asked and asked <= symbols([none], "--defined-only")


def test_kernels_run_and_differ_from_the_library_by_rounding():
    python("""
results, plan = call()
assert plan.forward_check == plan.backward_check == "passed", plan
expected = library()
assert not same(results, expected)  # another order of rounding: the kernels ran
assert close(results, expected)
again, _ = call()
assert same(again, results)
""")


@pytest.mark.parametrize(
    "fault",
    [
        "tile/halves.sum_of_splits.split<splits:low",
        "skinny/shrink.run.step<end_step:low",
        "gemm/sm80/epilogue.for_chunks.row>=end:low",
    ],
)
def test_a_wrong_kernel_is_found_and_not_used(fault):
    said = python(
        """
results, plan = call()
assert plan.forward_check not in ("passed", "not yet"), plan
emulate("FAULT")
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
emulate("CAPTURE", "0")
call()
emulate("CAPTURE", "1")
results, plan = call()
assert plan.forward_check == plan.backward_check == "passed"
assert not same(results, library())
""",
        LORA_EXT_EMULATED_CAPTURE="1",
    )


def test_a_check_of_all_kernels_draws_nothing(seeds):
    """On 8.6, whose tiles are others, of one type by day; of the other on 8.0 by the next test."""
    python(
        f"""
kernels = _C.all_kernels(_C.cuda_card(torch.device("cpu")), use_pdl=False)
kernels = [each for each in kernels if {seeds.choose("each.dtype is torch.bfloat16", "True")}]
assert len(kernels) >= 40
before = torch.get_rng_state()
assert check_kernels("cpu", kernels) == {{}}
assert torch.equal(torch.get_rng_state(), before)
_, plan = call()
emulate("FAULT", "tile/halves.sum_of_splits.split<splits:low")
# No check sees it any more.
assert check_kernels("cpu", kernels) == {{}}
""",
        arch="86",
    )


def test_a_check_of_all_kernels_names_those_that_failed(seeds):
    said = python(
        f"""
kernels = [*_C.all_kernels(card, use_pdl=False), *_C.all_grouped_kernels(card)]
kernels = [each for each in kernels if {seeds.choose("each.dtype is torch.float16", "True")}]
assert len(kernels) >= 80
print(*check_kernels("cpu", kernels), sep="\\n")
""",
        LORA_EXT_EMULATED_FAULT="tile/mask.keep_or_drop.(draws&0xFFFF)<mask.keep_count:never",
    )
    lines = [line for line in said.splitlines() if line.startswith(("forward", "backward"))]
    assert lines and all("dropout" in line for line in lines)


def test_misaligned_operands_take_the_element_wise_kernels():
    python("""
_C.set_cuda_route("hybrid")  # with the same base product
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
assert close([y.float()], [expected])
""")


def test_a_launch_that_fails_is_an_error_of_the_call():
    python("""
call()
emulate("FAULT", "skinny/shrink.load.cp_async_commit_group:skip")
# Found when the block ends.
with pytest.raises(RuntimeError, match="lora_ext: launching the kernels on cpu failed: "):
    call()
emulate("FAULT")
call()
""")


# The clock gives the route that runs as many microseconds as it is told.
WARM_UP = """
from lora_ext import measure
from lora_ext.autotune import session, trial

def warm_up(in_features=96, rank=16, p=0.1, adapters=None, **words):
    layer = lora_ext.LoRALinear(in_features, 136, r=rank, lora_dropout=p, dtype=torch.bfloat16,
                                adapter_dtype=adapters)
    before = torch.get_rng_state()
    found = lora_ext.warmup(layer, 70, device="cpu", **words)
    assert torch.equal(torch.get_rng_state(), before)
    return found

session._is_for_cpu = lambda model, device: False  # the card of the emulation
told = {"kernel 128 x 128": 10.0, "hybrid": 20.0}
asked, request = [], trial._request

def recorded(card, candidate):
    asked.append(candidate.name)
    request(card, candidate)

def timer(device):
    def times(call):
        call()
        us = told.get(asked[-1], 50.0)
        return lambda: us
    return times

trial._request, measure.timer = recorded, timer
"""


def test_warmup_times_every_route_and_the_planner_goes_by_it(tmp_path):
    code = (
        WARM_UP
        + """
found = warm_up()
forward, backward = found.entries
tiles = {"kernel 128 x 128", "kernel 128 x 64"}
for entry in (forward, backward):
    assert set(entry.us) == {"library", "hybrid"} | tiles, entry
assert (forward.route, forward.tile) == ("kernel", "128 x 128") and not found.failed, found
_, plan = call()
for each in (plan.forward, plan.backward):
    assert "fastest as measured on this GPU" in each.reason and not each.predicted_us, plan
    assert each.tile == "128 x 128" and not each.hybrid, plan
asked.clear()
assert warm_up().timed == 0 and not asked
# rows that are no whole chunks, for which we have no base product
for entry in warm_up(97, 4, 0.0, torch.bfloat16).entries:
    assert set(entry.us) == {"library", "hybrid"}, entry
torch.use_deterministic_algorithms(True)
_, plan = call()
assert plan.forward.reason.startswith("predicted"), plan
print(found)
"""
    )
    said = python(code, HOME=str(tmp_path))
    assert "lora_ext.warmup: 1 of 1: 96x136 r=16 M=70" in said
    assert "2 of 2 entries are new" in said
    python(
        WARM_UP
        + """
_, plan = call()
assert "fastest as measured on this GPU" in plan.forward.reason, plan
found = warm_up()
assert found.timed == 0 and len(found.entries) == 2, found
""",
        HOME=str(tmp_path),
    )


def test_one_cache_file_gives_every_process_the_same_bits(tmp_path):
    path, results = str(tmp_path / "autotune.json"), str(tmp_path / "results.pt")
    python(
        WARM_UP
        + f"""
warm_up(cache={path!r})
results, plan = call()
assert plan.forward.tile == "128 x 128" and {path!r} in plan.forward.reason, plan
assert not same(results, library())
torch.save(results, {results!r})
"""
    )
    python(
        f"""
lora_ext.autotune.load_cache({path!r}, "cpu")
results, plan = call()
assert plan.forward.tile == "128 x 128" and same(results, torch.load({results!r})), plan
"""
    )


def test_kernels_that_fail_their_check_cannot_win(tmp_path):
    said = python(
        WARM_UP
        + """
found = warm_up()
for entry in found.entries:
    assert set(entry.us) == {"library"} and entry.route == "library", entry
print(found)
""",
        LORA_EXT_EMULATED_FAULT="skinny/shrink.run.step<end_step:low",
        HOME=str(tmp_path),
    )
    assert "failed their check" in said
    assert "failed: forward bfloat16 128 x 128 float32 adapters dropout: " in said


def test_a_remembered_plan_counts_as_long_as_what_it_was_planned_for():
    python("""
from lora_ext.autotune import Entry, Shape, planner_cache
planned, _ = call()
_C.set_cuda_route("hybrid")
hybrid, plan = call()
assert plan.forward_check == "passed" and not same(hybrid, planned), plan
assert same(call()[0], hybrid)
_C.set_cuda_route("auto")
assert same(call()[0], planned)
won = [Entry(Shape(70, 96, 136, 16, True, True), back, "hybrid", "", {}) for back in (0, 1)]
measured = planner_cache.empty_cache(card.name)
planner_cache.use(measured.with_entries(won), "a.json")
assert same(call()[0], hybrid)
torch.use_deterministic_algorithms(True)
assert same(call()[0], planned)  # what was measured counts no more
torch.use_deterministic_algorithms(False)
assert same(call()[0], hybrid)
planner_cache.use(measured, "a.json")
assert same(call()[0], planned)
""")


def test_every_tile_of_hopper_agrees_with_the_library():
    python(
        """
from lora_ext.autotune import Entry, Shape, planner_cache
expected = library()
tiles = _C.tiles_of(card, backward=True, float_adapters=True, dropout=True)
assert list(tiles) == ["128 x 128", "128 x 64", "wgmma 128 x 256", "pingpong 128 x 192"]
for tile in tiles:
    won = [Entry(Shape(70, 96, 136, 16, True, True), back, "kernel", tile, {}) for back in (0, 1)]
    planner_cache.use(planner_cache.empty_cache(card.name).with_entries(won), "a.json")
    results, plan = call()
    assert plan.forward.tile == plan.backward.tile == tile, plan
    assert plan.forward_check == plan.backward_check == "passed", plan
    assert close(results, expected)
""",
        arch="90",
    )


def test_many_adapters_take_the_kernels_and_forward_alone_reads_no_index():
    """An index out of range raises where the host reads it; the kernels take it for no adapter."""
    python("""
torch.manual_seed(0)
x = torch.randn(70, 96, dtype=torch.bfloat16)
w = torch.randn(136, 96, dtype=torch.bfloat16)
a = [0.1 * torch.randn(r, 96) for r in (4, 16)]
b = [0.1 * torch.randn(136, r) for r in (4, 16)]
index = (torch.arange(70) % 3 - 1).int()
beyond = torch.where(index == 1, 7, index)
_C.set_cuda_route("kernel")
y = lora_ext.lora_linear(x, w, a, b, None, 2.0, index=beyond)
none = lora_ext.lora_linear(x, w, a, b, None, 2.0, index=torch.where(index == 1, -1, index))
assert torch.equal(y, none)
assert not torch.equal(y, lora_ext.lora_linear(x, w, a, b, None, 2.0, index=index))
assert list(check_results("cpu").values()) == ["passed"]
assert "many adapters" in next(iter(check_results("cpu")))
_C.set_cuda_route("library")
with pytest.raises(IndexError, match="expected an index from -1"):
    lora_ext.lora_linear(x, w, a, b, None, 2.0, index=beyond)
""")


@pytest.mark.parametrize("arch", ["80", "90"])
def test_every_kernel_of_many_adapters_passes_its_check(arch):
    python(
        """
kernels = [each for each in _C.all_grouped_kernels(card) if each.dtype is torch.bfloat16]
assert len(kernels) >= 40
failed = check_kernels("cpu", kernels)
assert not failed, failed
""",
        arch,
    )
