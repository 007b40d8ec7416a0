"""kernels/launch/ on our CUDA runtime: what the op asks of CUDA, and that a wrong call is seen."""

import sys
from pathlib import Path

import pytest

from emulated import mutants
from emulated.cuda.scripts import (
    BEGIN_COUNTED,
    COUNTS,
    DEQUANTIZE,
    DROPOUT,
    EXPERTS,
    FIRST_USE,
    IN_A_GRAPH,
    MANY,
    ON_CUDA,
    OWN_WEIGHTS,
    RUNS_CUDA,
    asked,
    python,
    unlike,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import count_launches

pytestmark = RUNS_CUDA

CALLS = [
    (80, "kernel", "rank=24"),
    (80, "hybrid", "rank=8, float_adapters=True, dropout_p=0.25"),
    (86, "kernel", "rank=8, dropout_p=0.25"),
    (90, "kernel", "rank=40"),
    (90, "kernel", "rank=40, dropout_p=0.25"),
    (90, "kernel", "rank=8, float_adapters=True"),
    (90, "hybrid", "rank=40"),
]


@pytest.mark.parametrize(("arch", "route", "options"), CALLS)
def test_cuda_is_asked_for_what_the_plan_says(arch, route, options):
    python(asked(arch, route, options))


@pytest.mark.parametrize("adapters", ["a list", "a pool", "a pool with ranks"])
def test_a_step_of_many_adapters_is_so_many_launches_and_no_op_of_torch(adapters):
    """Tables of factors and gradients are one launch, and so are dS and s S; missing ranks none."""
    python(
        f"card(80, route='kernel')\nadapters = {adapters!r}\n"
        + MANY
        + """
x, w, base, [a], [b], scaling, index = operands(70)
factors, ranks = ([a], [b]), None
if adapters == "a list":
    factors = list(a.unbind()), list(b.unbind())
elif adapters == "a pool with ranks":
    ranks = torch.tensor([16, 3, 0, 16], dtype=torch.int32).to(there)
given = x, w, base, *factors, scaling, index, None, ranks
wanted = [True, False], *([True] * len(factors[0]) for _ in range(2))
def step():
    y, s = forward(given)
    return kernels(record()), torch.ops.lora_ext.lora_grouped_backward(y, s, *wanted, *given)
step()  # the kernels' check
record(), ops()
of_forward, _ = step()
sequence = ["groupedentries"] if adapters == "a list" else []
sequence += 3 * ["groupedsegments"] + ["groupedshrink", "groupedreduce", "groupedgemm"]
assert of_forward == sequence, of_forward
of_backward = kernels(record())
assert of_backward == sequence + ["groupedwgrad", "groupedreducewgrad"], of_backward
assert ops() == [], ops()
"""
    )


RESERVED = """
SMS = 8  # of the runtime's device
card(arch, route="kernel")
call = Call(rows=1300, k=72, n=1040, **options)
results, blocks = {}, {}
for reserved in (0, 3, SMS):
    lora_ext.kernels.set_reserved_sms(reserved)
    call.forward()  # the kernels' check
    record()
    results[reserved] = call.forward()[0]
    [product] = [e for e in launches(record()) if kernel_of(e) == "gemm"]
    blocks[reserved] = product["grid"][0]
if arch == 90:  # one block an SM, in clusters of two; two SMs stay at least
    assert blocks == {0: SMS, 3: 4, SMS: 2}, blocks
else:  # as many on each SM as the tile lets
    assert blocks[0] // SMS == blocks[3] // 5 == blocks[SMS] // 2 >= 1, blocks
for each in results.values():
    assert close([each], [results[0]])
lora_ext.kernels.set_reserved_sms(0)
"""


# A process each: a device does not change its generation, by which plans are kept.
@pytest.mark.parametrize(
    ("arch", "options"),
    [(80, {"rank": 16}), (90, {"rank": 16}), (90, {"rank": 16, "float_adapters": True})],
)
def test_reserved_sms_are_left_to_others(arch, options):
    python(f"arch, options = {arch}, {options}\n{RESERVED}")


def test_first_use_of_a_tensor_makes_its_map_with_its_own_pitch():
    python(FIRST_USE)


def test_shared_memory_is_allowed_once_on_each_device():
    """The runtime refuses launches above what was allowed; the record has no refusal."""
    python("""
card(90, route="kernel")
for index in (0, 1, 0):
    call = Call(device=torch.device("cuda", index))
    assert close(call.both(), call.library())
    assert max(each["shared"] for each in record() if "shared" in each) > 190 * 1024
""")


def test_each_launch_and_each_read_of_the_host_is_counted():
    python(
        """
from lora_ext.functional import dropout_mask
begin()
device = torch.device("cuda", 1)
calls.set_device(1)
case = linear("bfloat16", device, rows=64)
x, seed = case.inputs[0].detach(), torch.tensor([7]).to(device)
forward, plain = case.forward, case.count()
assert {call.kind for call in plain["forward"]} == {"kernel"}  # lora_decode
for plant, more, moved in (
    (lambda: None, {}, 0),
    (lambda: dropout_mask(seed, 64, 32, 0.5), {"kernel": 1}, 8 + 64 * 32),
    (lambda: x + x, {"library": 1}, 2 * x.nbytes),
    (lambda: x[:8, :16] * 2, {"library": 1}, 2 * 2 * 8 * 16),
    (lambda: x.index_select(0, seed), {"library": 1}, 8 + 2 * 2 * 4096),
    (lambda: x.T.expand(3, 4096, 64), {}, 0),
    (lambda: x.new_empty(0, 5) * 2, {}, 0),
    (lambda: seed.item(), {"host": 1}, 0),
    (lambda: seed.tolist(), {"host": 1, "library": 1}, 8),
    (lambda: torch.tensor([1, 2], device=device), {"host": 1, "library": 1}, 16),
    (lambda: seed[seed > 3], {"host": 1, "library": 3}, (8 + 1) + (1 + 8) + (8 + 1 + 8)),
):
    case.forward = lambda: (plant(), forward())[1]
    found = case.count()
    assert found["backward"] == plain["backward"]
    new = Counter(call.kind for call in found["forward"])
    new.subtract(call.kind for call in plain["forward"])
    size = [sum(call.bytes for call in each["forward"]) for each in (found, plain)]
    assert (+new, size[0] - size[1]) == (more, moved), (new, size, more, moved)
""",
        BEGIN_COUNTED,
    )


@pytest.mark.parametrize("kind", ["bfloat16", "NF4"])
def test_what_is_counted_is_what_is_launched_and_asked_of_torch(kind):
    python(
        f"kind = {kind!r}"
        + """
counted.EXPERTS, counted.HIDDEN, counted.INNER, counted.SLOTS = 5, 64, 72, 3
begin()
for number in range(len(CARDS)):
    calls.set_device(number)
    found = []
    for only in (1, 0):
        calls.count_only(only)
        case = experts(kind, torch.device("cuda", number), tokens=20)
        with torch.no_grad():
            case.forward()
            calls.record(), calls.ops()
            case.forward()
        record = calls.record()
        found.append((calls.kernels(record), calls.ops()))
    assert found[0] == found[1] and len(found[0][0]) >= 2, found
""",
        BEGIN_COUNTED,
    )


def test_the_table_of_launches_is_that_of_the_calls():
    kernel, library = ["kernel", "gemm", 60, 3.0], ["library", "mm", 40, 2.0]
    host = ["host", "copy_", 0, 0.0]
    row = {"layer": "experts", "kind": "NF4", "arch": 90, "needed": 80, "frozen": [library] * 2}
    forward, backward = [kernel, library, kernel], [kernel, host, library]
    rows = [row | {"direction": "forward", "calls": forward}]
    rows += [row | {"direction": "backward", "calls": backward}]
    line = "| experts | NF4 | 9.0 | 2+1 | 1+1 | 1 | 1.62 | 1.62 |\n"
    assert count_launches.table(rows) == count_launches.HEAD + line
    made = count_launches.table(count_launches.counted(["experts, 1 token"]))
    assert made.removeprefix(count_launches.HEAD) in count_launches.PAGE.read_text()


# With fewer clusters at a time than its SMs have room for, or of another generation.
UNLIKE = [(90, 6, 2, 4), (80, 3, 0, 6)]


@pytest.mark.parametrize("cards", UNLIKE)
def test_each_of_two_unlike_cards_has_its_own_plan_check_and_grid(cards):
    python(unlike(*cards))


@pytest.mark.parametrize("loading", ["cudaFuncSetAttribute", "cudaOccupancyMaxActiveClusters"])
def test_a_kernel_that_is_loaded_on_a_busy_device_holds_up_no_other(loading):
    """Whose launch the work of that device may wait for."""
    python(
        f"card(90, route='kernel')\nload_in({loading!r})"
        + """
from threading import Thread
from time import monotonic, sleep
devices = [torch.device("cuda", index) for index in (0, 1)]
calls = [Call(rows=70, k=72, n=136, rank=8, device=each) for each in devices]
for each in devices:  # which wait for a stream
    for kernels_of_card in _C.all_kernels(_C.cuda_card(each), True):
        _C.remember_check(each, kernels_of_card, "passed")
keep_busy(1)
busy, other = (Thread(target=calls[index].forward, daemon=True) for index in (1, 0))
busy.start()
end = monotonic() + 60
while waiting() == 0 and monotonic() < end:
    sleep(0.01)
assert waiting() > 0
other.start()
other.join(60)
assert not other.is_alive() and busy.is_alive()
keep_busy(-1)
busy.join(60)
assert not busy.is_alive() and last_error() == 0
for call in calls:
    assert close(call.both(), call.library())
"""
    )


def test_a_cuda_device_without_an_index_is_the_current_one():
    python("""
card(90)
for index in (1, 0):
    set_device(index)
    found = _C.cuda_card(torch.device("cuda"))
    assert (found.name, found.arch, found.error) == ("emulated sm_90", 90, ""), found.error
assert last_error() == 0
assert lora_ext.kernels.plan(64, 64, 64, 8, card=torch.device("cuda")).forward.reason
unknown = _C.cuda_card(torch.device("cuda", 5))
assert (unknown.arch, unknown.name) == (0, "") and "invalid device ordinal" in unknown.error
assert last_error() == 0
""")


@pytest.mark.parametrize("mutant", [each.name for each in mutants.mutants_of_faults("cuda")])
def test_a_wrong_call_of_cuda_is_seen(mutant):
    calls = [asked(90, "kernel", "rank=40"), asked(80, "kernel", "rank=24"), FIRST_USE, DROPOUT]
    calls += [IN_A_GRAPH, OWN_WEIGHTS]
    for stem, code in (("dequantize", DEQUANTIZE), ("experts", ON_CUDA + EXPERTS)):
        calls.insert(0 if mutant.startswith(stem) else len(calls), code)
    of_devices = [COUNTS, *(unlike(*cards) for cards in UNLIKE)]
    for code in of_devices if mutant.startswith("devices") else calls:
        try:
            python(f"plant({mutant!r})\n{code}")
        except AssertionError:
            return
    pytest.fail("no call sees it")
