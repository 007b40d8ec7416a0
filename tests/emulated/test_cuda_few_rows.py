"""lora_decode on our CUDA runtime: one launch, and where the counts of its blocks are."""

import pytest

from emulated.cuda.scripts import COUNTS, FEW_ROWS, IN_A_GRAPH, RUNS_CUDA, python

pytestmark = RUNS_CUDA


@pytest.mark.parametrize("arch", [80, 86, 90])
@pytest.mark.parametrize("options", ["", ", float_adapters=True"])
def test_few_rows_are_one_launch_that_clears_nothing(arch, options):
    python(
        f"card({arch})\n"
        + FEW_ROWS
        + f"made = [Call(rows=rows, k=264, n=536, rank=16, apart=8{options})"
        + """ for rows in (1, 13, 64)]
for call in made:
    assert close(call.both(), call.library())  # and the check, and what is cleared once
    results, launched, cleared = asked(call)
    assert launched == ["decode"] and cleared == [], (launched, cleared)
    assert close(results, call.library()[:2])
    again, _, _ = asked(call)
    assert same(results, again)
    plan = call.plan()
    assert plan.forward.tile == "decode" and plan.forward_check == "passed", plan
"""
    )


def test_few_rows_in_a_graph_have_counts_of_their_own():
    python(IN_A_GRAPH)


def test_nothing_but_results_lives_on_in_the_pool_of_a_graph():
    """Else torch.compile(mode="reduce-overhead") raises an error after a first call, which it runs
    in its pool, or after a capture."""
    python(
        "card(90)\n"
        + FEW_ROWS
        + """
call = Call(rows=7, k=264, n=536, rank=16)
open_pool(1)
for capturing in (False, True):
    card(90, capturing=capturing)
    results = call.forward()
    assert pool() == {each.data_ptr() for each in results}, pool()
    del results
    assert pool() == set()
open_pool(0)
assert last_error() == 0
"""
    )


@pytest.mark.parametrize("call", ["cudaMalloc", "cudaMemsetAsync"])
def test_without_memory_for_them_counts_are_in_the_workspace(call):
    python(
        "card(90)\n"
        + FEW_ROWS
        + f"""
call = Call(rows=7, k=264, n=536, rank=16)
expected = call.library()[:2]
fail({call!r}, 1, OUT_OF_MEMORY)
call.forward()  # and the check; not asked for again
for capturing in (False, False, True):
    card(90, capturing=capturing)
    results, launched, cleared = asked(call)
    assert launched == ["decode"] and cleared == [4 * (9 + 1 + 1)], (launched, cleared)
    assert close(results, expected)
card(90)
fail("cudaMemsetAsync", 1, LAUNCH_FAILURE)
with pytest.raises(RuntimeError, match="launching the kernels on cuda:1 failed: unspecified"):
    call.forward()
assert settled()
"""
    )


def test_each_stream_and_each_graph_has_counts_of_its_own_on_its_device():
    """No more than it says: a launch for more has its own, in its workspace."""
    python(COUNTS)


def test_a_wait_for_one_device_holds_up_no_other():
    """Whose launch it may wait for: with a thread for each device and a collective between them."""
    python(
        """
from threading import Thread
from time import monotonic, sleep
card(80)
keep_busy(1)
first = [Thread(target=counts, args=(1, 9), daemon=True) for _ in range(2)]
for thread in first:
    thread.start()
end = monotonic() + 30
while waiting() < 2 and monotonic() < end:
    sleep(0.01)
assert waiting() >= 2
other = Thread(target=counts, args=(0, 9), daemon=True)
other.start()
other.join(30)
assert not other.is_alive() and all(thread.is_alive() for thread in first)
keep_busy(-1)
for thread in first:
    thread.join(30)
    assert not thread.is_alive()
assert counts(1, 9) and last_error() == 0
"""
    )


def test_few_rows_of_many_adapters_are_one_launch_from_a_pool_and_two_from_a_list():
    python(
        "card(80)\n"
        + FEW_ROWS
        + """
torch.manual_seed(0)
def normal(*shape):
    return (0.1 * torch.randn(*shape)).bfloat16()
x, w, a, b = normal(9, 136), normal(264, 136), normal(4, 16, 136), normal(4, 264, 16)
index = torch.tensor([3, -1, 0, 0, 2, 3, -1, 1, 2], dtype=torch.int32)
base = torch.nn.functional.linear(x.float(), w.float())
for row, adapter in enumerate(index.tolist()):
    if adapter >= 0:
        base[row] += 2 * b[adapter].float() @ (a[adapter].float() @ x[row].float())
on = [each.to(there) for each in (x, w, a, b, index)]
lists = [[each.to(there) for each in pool] for pool in (a, b)]
for factors, expected in ((on[2:4], ["decode"]), (lists, ["groupedentries", "decode"])):
    for _ in range(2):
        record()
        y = lora_ext.lora_linear(on[0], on[1], *factors, scaling=2.0, index=on[4])
        calls = record()
        assert close([y.cpu()], [base])
    assert kernels(calls) == expected, calls
    assert not [each for each in calls if each["call"] == "cudaMemsetAsync"]
"""
    )
