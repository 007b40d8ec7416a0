"""How the package checks kernels, in emulation: what it remembers, raises, warns, and where."""

import pytest

from emulated.package import child

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("package")]

TERM_LOST = "tile/halves.sum_of_splits.split<splits:low"
BEGIN = """
from lora_ext.kernels import isolated

_C.set_cuda_route("hybrid")
some = [each for each in named("forward bfloat16 hybrid") if "onto a base" not in each.name]
assert len(some) == 8
"""


def python(code: str, arch: str = "80", **environment: str) -> str:
    return child.python(BEGIN + code, arch, **environment)


def test_without_memory_for_a_check_nothing_is_remembered():
    python(
        """
y = forward()
assert checked() == "not yet" and torch.equal(y, by_library(forward))
failed = check_kernels("cpu", some[:1])
assert list(failed) == [some[0].name] and "could not be checked: " in failed[some[0].name], failed
emulate("THROW")
assert not torch.equal(forward(), by_library(forward)) and checked() == "passed"
assert check_kernels("cpu", some) == {}
""",
        LORA_EXT_EMULATED_THROW="memory",
    )


def test_an_error_that_is_no_launch_s_is_raised_and_not_remembered():
    python(
        """
with pytest.raises(RuntimeError, match="an emulated error"):
    forward()
assert checked() == "not yet"
emulate("THROW")
forward()
assert checked() == "passed"
""",
        LORA_EXT_EMULATED_THROW="error",
    )


def test_kernels_that_do_not_end_are_an_error_that_says_to_restart():
    python(
        """
assert _C.check_timeout() == 10
warnings.simplefilter("ignore")
with pytest.raises(RuntimeError, match="had not ended 10 s after their launch.*restart it"):
    forward()
assert checked() == "had not ended 10 s after their launch"
assert torch.equal(forward(), by_library(forward))
""",
        LORA_EXT_EMULATED_HANG="wait",
    )


def test_without_a_limit_a_check_takes_its_time():
    python(
        """
with pytest.raises(ValueError, match="expected seconds > 0, but got 0"):
    lora_ext.kernels.set_check_timeout(0)
lora_ext.kernels.set_check_timeout(None)
forward()
assert checked() == "passed"
""",
        LORA_EXT_EMULATED_HANG="wait",
    )


def test_a_failed_check_is_a_python_warning_of_forward():
    said = python(
        """
warnings.simplefilter("error")
with pytest.raises(UserWarning, match='the kernels "forward bfloat16 hybrid.*" failed their check'):
    forward()
assert checked().startswith("y differs from its value in float64 by "), checked()
warnings.simplefilter("ignore")
half = [each.half() for each in operands()]
lora_ext.lora_linear(*half[:2], *operands()[2:])
failed = {name for name, why in check_results("cpu").items() if why != "passed"}
assert len(failed) == 2, failed
""",
        LORA_EXT_EMULATED_FAULT=TERM_LOST,
    )
    assert said == ""


def test_kernels_that_make_nan_fail_their_check():
    """Of a column of S that nobody writes: under deterministic algorithms such memory is NaN."""
    python(
        """
import re
warnings.simplefilter("ignore")
torch.use_deterministic_algorithms(True)
failed = check_kernels("cpu", some[:1])
assert re.search("in float64 by -?nan in row", failed.get(some[0].name, "")), failed
""",
        LORA_EXT_EMULATED_FAULT="skinny/shrink.store.column<p.columns:low",
    )


THREADS = """
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
begin, given = Barrier(4), operands()
def first_use(_):
    begin.wait()
    return lora_ext.lora_linear(*given, None, 2.0)
with ThreadPoolExecutor(4) as pool:
    found = list(pool.map(first_use, range(4)))
assert all(torch.equal(y, found[0]) for y in found)
expected = by_library(forward)
"""


def test_threads_may_share_a_first_use():
    said = python(
        THREADS
        + """
assert not torch.equal(found[0], expected) and checked() == "passed"
assert len(check_results("cpu")) == 1
"""
    )
    assert said == ""


def test_threads_whose_first_use_fails_are_warned_once():
    said = python(
        THREADS
        + """
assert torch.equal(found[0], expected) and checked().startswith("y differs")
""",
        LORA_EXT_EMULATED_FAULT=TERM_LOST,
    )
    assert said.count("failed their check") == 1


def test_a_launch_error_is_said_without_a_backtrace():
    said = python(
        "forward()", LORA_EXT_EMULATED_FAULT="skinny/shrink.load.cp_async_commit_group:skip"
    )
    assert "failed their check" in said and "launching the kernels on cpu failed: " in said
    assert "Exception raised from" not in said


def test_explain_of_layers_shows_a_failed_check():
    python(
        """
from lora_ext.kernels.kernel_plan import problem_of
from lora_ext.call.decision import cuda_path
warnings.simplefilter("ignore")
problem = problem_of(70, 96, 136, 16, torch.bfloat16, torch.float32, False)
assert cuda_path(cpu, problem)[0] == "fused"
forward()
path, reason = cuda_path(cpu, problem)
assert path == "library" and "failed their check on cpu: y differs" in reason, reason
""",
        LORA_EXT_EMULATED_FAULT=TERM_LOST,
    )


def test_the_reference_does_not_depend_on_the_precision_of_float32_products():
    python("""
torch.set_float32_matmul_precision("medium")
torch.use_deterministic_algorithms(True)
with torch.autocast("cpu", dtype=torch.bfloat16):
    wide = [k for k in _C.all_kernels(card, True) if "float32" in k.name and "128 x 64" in k.name]
    assert check_kernels("cpu", wide) == {}
""")


# In a tile after a block's first: accumulators as the tile before left them; and the turn that one
# consumer of a pingpong tile leaves to the other. In a launch after the first: counts as that left
# them.
@pytest.mark.parametrize(
    ("arch", "fault", "tiles"),
    [
        ("80", "loop.clear", "128 x 128"),
        ("90", "gemm/sm90a/multiply.pass_turn.bar_arrive:skip", "pingpong 128 x 192"),
        ("80", "decode_counts_stay", "decode up to 8 rows"),
    ],
)
def test_what_goes_wrong_in_a_second_tile_or_launch_is_found(arch, fault, tiles):
    python(
        f"""
warnings.simplefilter("ignore")
asked = named("forward bfloat16 {tiles}")
failed = check_kernels("cpu", asked)
assert set(failed) == {{each.name for each in asked}} and failed, failed
""",
        arch,
        LORA_EXT_EMULATED_FAULT=fault,
    )


def test_what_goes_wrong_where_experts_have_ranges_of_rows_is_found():
    """A list with an index comes by no end."""
    python(
        """
warnings.simplefilter("ignore")
grouped = [k for k in _C.all_grouped_kernels(card) if " bfloat16 hybrid" in k.name]
asked = [k for k in grouped if k.name.startswith("backward") or "onto a base" in k.name]
failed = check_kernels("cpu", asked)
assert set(failed) == {each.name for each in asked} and len(failed) == 16, failed
""",
        LORA_EXT_EMULATED_FAULT="grouped/segments.range_of.key<groups:never",
    )


@pytest.mark.parametrize(
    ("fault", "of"),
    [
        ("experts_first_weight", ""),
        ("experts_rows_not_gathered", ""),
        ("experts_first_bias", "forward"),
        ("experts_mask_by_y", "backward"),
    ],
)
def test_what_goes_wrong_with_experts_is_found(fault, of):
    python(
        f"""
warnings.simplefilter("ignore")
words = " bfloat16", "dropout", "experts", "float32"
asked = [k for k in _C.all_grouped_kernels(card) if all(word in k.name for word in words)]
failed = check_kernels("cpu", asked)
expected = {{k.name for k in asked if k.name.startswith({of!r})}}
assert set(failed) == expected and len(asked) == 10, failed
""",
        LORA_EXT_EMULATED_FAULT=fault,
    )


ISOLATED = """
begun = []
def never(*_):
    raise AssertionError("checked in this process")
here, _C.check_kernels = _C.check_kernels, never
warnings.simplefilter("ignore")
isolated._HOST_S = 0.0
def check(kernels, timeout_s=10.0):
    return check_kernels("cpu", kernels, isolated=True, timeout_s=timeout_s, begins=begun.append)
"""


def test_a_child_checks_and_this_process_remembers():
    python(
        ISOLATED
        + f"""
assert check(some) == {{}} and begun == [each.name for each in some]
assert check_results("cpu") == dict.fromkeys(begun, "passed")
assert check(some) == {{}} and len(begun) == 8  # known
emulate("FAULT", {TERM_LOST!r})
wrong = named("forward float16 128 x 64")[:2]
failed = check(wrong)
assert set(failed) == {{each.name for each in wrong}}
assert all("differs from its value in float64" in why for why in failed.values()), failed
"""
    )


@pytest.mark.parametrize(
    ("what", "value", "why"),
    [
        ("HANG", "launch", "the process that checked it said nothing for 20 s"),
        ("HANG", "wait", "had not ended 20 s after their launch"),
        ("THROW", "end", "the process that checked it ended with SIGABRT"),
    ],
)
def test_a_child_that_is_lost_costs_one_check_and_leaves_this_process_alone(what, value, why):
    python(
        ISOLATED
        + f"""
emulate({what!r}, {value!r})
failed = check(some[:1], 20.0)
assert list(failed) == [some[0].name] and failed[some[0].name].startswith({why!r}), failed
emulate({what!r})
assert check(some) == failed and len(begun) == 8
_C.check_kernels = here
forward()
"""
    )


def test_kernels_are_not_checked_where_every_child_is_lost():
    python(
        ISOLATED
        + """
emulate("THROW", "end")
failed = check(some)
lost = [why for why in failed.values() if "SIGABRT" in why]
left = [why for why in failed.values() if why.startswith("could not be checked: 4 processes")]
assert len(lost) == 4 and len(left) == 4 and len(check_results("cpu")) == 4, failed
"""
    )


def test_where_no_child_can_start_this_process_checks():
    python("""
isolated.sys.executable = "/bin/false"
assert check_kernels("cpu", some, isolated=True) == {}
assert len(check_results("cpu")) == 8
""")
