"""kernels/launch/ on our CUDA runtime: what the op does if a call fails or a driver is old."""

import pytest

from emulated.cuda.scripts import MANY, RUNS_CUDA, python

pytestmark = RUNS_CUDA


FAILS = """
def failing(name, nth, error, text):
    fail(name, nth, error)
    set_device(0)
    with pytest.raises(RuntimeError, match=f"launching the kernels on cuda:1 failed: {text}"):
        call.both()
    assert settled() and current_device() == 0, name
    assert same(call.both(), expected), name
"""


@pytest.mark.parametrize("arch", [80, 90])
def test_a_launch_that_fails_is_raised_and_leaves_nothing_behind(arch):
    """Whichever of the call's launches it is."""
    python(
        f"""
card({arch}, route="kernel")
call = Call()
expected = call.both()
record()
call.both()
count = len(launches(record()))
assert count > 4, count
"""
        + FAILS
        + """
errors = (
    (OUT_OF_MEMORY, "out of memory"),
    (NO_IMAGE, "no kernel image"),
    (LAUNCH_FAILURE, "unspecified launch failure"),
)
for nth in range(1, count + 1):
    failing("cudaLaunchKernelEx", nth, *errors[nth % 3])
"""
    )


def test_every_other_call_that_fails_is_raised_and_leaves_nothing_behind():
    python(
        """
card(90, route="kernel")
call = Call(k=520)
expected = call.both()
"""
        + FAILS
        + """
failing("cudaGetDevice", 1, INVALID_DEVICE, "invalid device ordinal")
failing("cudaGetDevice", 2, INVALID_DEVICE, "invalid device ordinal")
call = Call(k=520)  # maps of its own
failing("cuTensorMapEncodeTiled", 1, 1, "another error")
"""
    )


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("cudaFuncSetAttribute", "LAUNCH_FAILURE"),
        ("cudaOccupancyMaxActiveClusters", "NO_IMAGE"),
        ("cudaLaunchKernelEx", "NO_IMAGE"),
        ("cudaFuncSetAttribute", "OUT_OF_MEMORY"),
        ("cudaLaunchKernelEx", "OUT_OF_MEMORY"),
    ],
)
def test_a_first_use_that_fails_is_left_to_the_library(call, error):
    """For good, but without memory this once."""
    said = python(f"""
card(90, route="kernel")
call = Call()
fail({call!r}, 1, {error})
results = call.forward()
assert settled()
checks = [call.plan().forward_check]
_C.set_cuda_route("library")
assert same(results, call.forward())
_C.set_cuda_route("kernel")
call.forward()
checks.append(call.plan().forward_check)
if {error} == OUT_OF_MEMORY:
    assert checks == ["not yet", "passed"]
else:
    assert checks[0] == checks[1] and checks[0] not in ("passed", "not yet"), checks
""")
    assert ("failed their check on cuda:1" in said) == (error != "OUT_OF_MEMORY")


def test_a_stream_that_cannot_be_asked_counts_as_capturing():
    python("""
card(90, route="kernel")
call = Call(rows=70, k=72, n=136, rank=8)
fail("cudaStreamIsCapturing", 1, OUT_OF_MEMORY)
results = call.forward()
assert settled()
assert call.plan().forward_check == "not yet"
card(90, capturing=True)
assert same(call.forward(), results) and call.plan().forward_check == "not yet"
card(90)
call.forward()
assert call.plan().forward_check == "passed" and last_error() == 0
""")


REFUSED = """
def refused(call, *arguments, said):
    record()
    with pytest.raises(RuntimeError, match=said):
        call(*arguments)
    assert record() == []
"""


@pytest.mark.parametrize("rows", [9, 70])
def test_many_adapters_are_not_captured_before_their_check_and_the_error_says_so(rows):
    """By the library route, which reads their index on the host, the capture would be lost."""
    python(
        f"card(80, capturing=True, route='kernel')\nrows = {rows}\n"
        + MANY
        + REFUSED
        + """
first = rf"expected kernels that were checked before .* x of .{rows}, 136. and 4 adapters"
given = operands(rows)
refused(forward, given, said=f"lora_linear: {first} .* call the layer once .* before the capture")
card(80)
y, s = forward(given)
card(80, capturing=True)
again, _ = forward(given)
assert torch.equal(y, again) and kernels(record())
refused(backward, given, y, s, said=first)
card(80)
wanted = backward(given, y, s)
card(80, capturing=True)
assert torch.equal(backward(given, y, s)[0], wanted[0])
with torch.no_grad():  # one adapter is as it was
    Call(rows=rows, dtype=torch.float16).forward()
"""
    )


def test_many_adapters_by_the_library_route_are_not_captured():
    python(
        "card(80, capturing=True)\n"
        + MANY
        + REFUSED
        + """
wide, given = operands(70, torch.float32), operands(70)
refused(forward, wide, said="needs nothing on the host .* outside of the capture")
_C.set_cuda_route("library")
refused(forward, given, said="needs nothing on the host .* x of .* the library route is taken")
Call().both()
card(80)
forward(given)
"""
    )


def test_a_driver_without_tensor_maps_leaves_wgmma_out():
    python("""
card(90, route="kernel")
fail("cudaGetDriverEntryPointByVersion", 1, OUT_OF_MEMORY)
call = Call()
plan = call.plan()
assert settled()
assert not plan.forward.wgmma and "encodes no tensor maps" in str(plan.forward), plan
assert close(call.both(), call.library()) and last_error() == 0
""")


@pytest.mark.parametrize(
    ("version", "reason", "driver"),
    [
        ("OLDEST_DRIVER", "driver version is insufficient", "11.8, older than CUDA 1"),
        ("0", "no CUDA-capable device", "none"),
    ],
)
def test_a_driver_that_cannot_run_the_kernels_is_named(version, reason, driver):
    said = python(f"""
card(90, {version})
options = dict(rows=70, k=72, n=136, rank=8)
call = Call(**options)
plan = call.plan()
for part in (plan.forward, plan.backward):
    assert not part.kernel and "CUDA cannot use the device: " in part.reason, part.reason
    assert "{reason}" in part.reason, part.reason
assert same(call.both(), call.library())
assert str(lora_ext.build_info()["cuda_driver"]).startswith("{driver}")
with pytest.raises(RuntimeError, match="launching dropout on cuda:1 failed: .*{reason}"):
    Call(**options, dropout_p=0.5).both()
assert last_error() == 0 and current_device() == 0
""")
    assert said.count("the CUDA kernels cannot be used on cuda:1") == 1
    if driver != "none":
        assert "update the driver, or reinstall" in said
