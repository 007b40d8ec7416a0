"""kernels/launch/ on our CUDA runtime: what the op asks of CUDA, and what it does if that fails."""

import pytest
import torch

from emulated import mutants
from emulated.cuda import build as cuda_build
from emulated.package import build

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(
        torch.version.cuda is not None, reason="this torch has a CUDA device itself"
    ),
]

BEGIN = """
import warnings
from emulated.cuda.calls import *
"""


@pytest.fixture(scope="module", autouse=True)
def package():
    cuda_build.make()


def python(code: str) -> str:
    done = build.run(["-c", BEGIN + code], package=cuda_build.PACKAGE, PYTHONPATH="tests")
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout + done.stderr


# On Hopper: T made in the same grid, in both directions; with dropout, in dX alone; and with float
# adapters before the product.
CALLS = [
    (80, "kernel", "rank=24"),
    (80, "hybrid", "rank=8, float_adapters=True, dropout_p=0.25"),
    (86, "kernel", "rank=8, dropout_p=0.25"),
    (90, "kernel", "rank=40"),
    (90, "kernel", "rank=40, dropout_p=0.25"),
    (90, "kernel", "rank=8, float_adapters=True"),
    (90, "hybrid", "rank=40"),
]


def asked(arch: int, route: str, options: str) -> str:
    return (
        f"""
card({arch}, route="{route}")
set_device(0)
call = Call(k=520, n=528, apart=8, {options})
assert close(call.both(), call.library())
record()
results = call.forward()
forward = record()
results += call.backward(results[1])
backward = record()
assert settled() and current_device() == 0

def early(calls):
    return [kernel_of(each) for each in launches(calls) if each["programmatic"]]

plan = call.plan()
assert plan.forward_check == plan.backward_check == "passed", plan
"""
        + """
for planned, calls, n, k, results in (
    (plan.forward, forward, call.n, call.k, results[:1]),
    (plan.backward, backward, call.k, call.n, results[2:3]),
):
    launched = kernels(calls)
    assert all(each["device"] == 1 for each in launches(calls))
    product = "fusedshrink" if planned.fused_shrink else "gemm"
    assert launched.count(product) == 1, launched
    # The product may begin early where it waits for T, and lora_wgrad beside it.
    assert ("reduce" in launched) != planned.fused_shrink
    assert early(calls) == (
        [product] * ("launched with PDL" in str(planned).split("lora_wgrad")[0])
        + ["wgrad"] * planned.wgrad_uses_pdl
    ), (launched, early(calls), str(planned))
    assert "fusedshrink" not in early(calls)
    in_clusters = [kernel_of(each) for each in launches(calls) if each["cluster"] != [1, 1, 1]]
    assert in_clusters == [product] * planned.wgmma
    assert all(each["cluster"] in ([1, 1, 1], [2, 1, 1]) for each in launches(calls))
    names = [each["call"] for each in calls if each["call"] != "cuTensorMapEncodeTiled"]
    assert names.count("cudaMemsetAsync") == planned.fused_shrink
    if planned.fused_shrink:  # ticket, written, and a flag for each row block, in pairs
        cleared = names.index("cudaMemsetAsync")
        flags = 2 * 32 + 2 * ((call.rows + 255) // 256)
        clear = [each for each in calls if each["call"] == "cudaMemsetAsync"]
        assert [(each["value"], each["bytes"]) for each in clear] == [(0, 4 * flags)]
        after = launched[launched.index("fusedshrink"):]
        assert names[cleared:].count("cudaLaunchKernelEx") == len(after)
    maps = {each["data"]: each for each in calls if each["call"] == "cuTensorMapEncodeTiled"}
    if planned.wgmma:
        # Kept by their key: those of weight and of results may be of a call before.
        left = call.x if planned is plan.forward else call.grad
        expected = [(left, call.rows, k)] if left.data_ptr() in maps else []
        if call.weight.data_ptr() in maps:
            expected.append((call.weight, call.n, call.k))
        for tensor, rows, columns in expected:
            found = maps[tensor.data_ptr()]
            assert (found["rows"], found["columns"]) == (rows, columns)
            assert found["stride"] == 2 * tensor.stride(0) > 2 * columns, found
        for found in maps.values():
            assert found["box"][0] == 64 and found["box"][1] <= 256
    else:
        assert not maps
"""
    )


@pytest.mark.parametrize(("arch", "route", "options"), CALLS)
def test_cuda_is_asked_for_what_the_plan_says(arch, route, options):
    python(asked(arch, route, options))


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
    [product] = [e for e in launches(record()) if kernel_of(e) in ("gemm", "fusedshrink")]
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


FIRST_USE = """
card(90, route="kernel")
first = Call()
y, s = first.forward()
gradients = first.backward(s)  # all kept: a new Y in the place of a Y or dY would find its map
call = Call(apart=16)
record()
results = call.forward()
maps = [each for each in record() if each["call"] == "cuTensorMapEncodeTiled"]
strides = {each["data"]: (each["rows"], each["columns"], each["stride"]) for each in maps}
for tensor in (call.x, call.weight, call.lora_a):
    assert strides[tensor.data_ptr()] == (*tensor.shape, 2 * (tensor.shape[1] + 16)), strides
assert strides[results[0].data_ptr()] == (300, 520, 2 * 520)
assert close(call.both(), call.library())
"""


def test_first_use_of_a_tensor_makes_its_map_with_its_own_pitch():
    python(FIRST_USE)


def test_shared_memory_is_allowed_once_on_each_device():
    """The runtime refuses launches above what was allowed; the record has no refusal."""
    python("""
card(90, route="kernel")
for index in (0, 1, 0):
    call = Call(device=torch.device("cuda", index))
    assert close(call.both(), call.library())
    assert max(each["shared"] for each in record() if "shared" in each) > 200 * 1024
""")


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


# Dropout


DROPOUT = """
card(75)
places = ((1, 0, 0), (70, 5, 0), (64, 32, 3), (300, 40, 2**33), (33, 8, 1), (31, 31, 0))
for columns, first_column, first_row in places:
    seed = torch.tensor(3**30)
    masks = [
        lora_ext.functional.dropout_mask(
            on, 5, columns, 0.3, row_offset=first_row, col_offset=first_column
        )
        for on in (seed, seed.to("cuda"))
    ]
    assert torch.equal(masks[0], masks[1].cpu()), (columns, first_column)
    assert 0 < masks[0].sum() < masks[0].numel() or columns == 1
assert last_error() == 0 and record()
"""


def test_dropout_on_cuda_has_the_bits_of_the_cpu():
    python(DROPOUT)


# Quantised weights


DEQUANTIZE = """
card(80)
ops = torch.ops.lora_ext
there = torch.device("cuda", 1)
generator = torch.Generator().manual_seed(0)

def after(tensor, before):  # as it is, behind so many elements
    whole = torch.zeros(before + tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    whole[before:] = tensor.flatten()
    return whole[before:].view(tensor.shape)

def both(op, tensors, numbers, shape, dtype, before, before_out):
    expected = torch.empty(shape, dtype=dtype)
    op(*tensors, *numbers, expected)
    given = [each if each is None else after(each.to(there), before) for each in tensors]
    out = after(torch.full(shape, float("nan"), dtype=dtype, device=there), before_out)
    op(*given, *numbers, out)
    assert torch.equal(out.cpu(), expected), (op, shape, dtype, before, before_out)

def four_bits(packed, table, scale, one, two, three, block, scale_block, out):
    ops.dequantize_4bit(packed, table, scale, block, one, two, three, scale_block, out)

def eight_bits(codes, scale, multiplier, out):
    ops.dequantize_8bit(codes, scale, multiplier, out)

def floats(*shape):
    return torch.randn(shape, generator=generator)

def bytes_of(*shape):
    return torch.randint(0, 256, shape, generator=generator).to(torch.uint8)

record()
launched = 0
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for shape, block, *before in (
        ((64, 512), 64, 0, 0), ((3, 5), 32, 0, 0), ((40, 250), 4096, 0, 0),
        ((9, 1000), 128, 1, 0), ((9, 1000), 128, 0, 1),
    ):
        count = shape[0] * shape[1]
        packed, blocks = bytes_of((count + 1) // 2), -(-count // block)
        tensors = (packed, floats(16), floats(blocks), None, None, None)
        both(four_bits, tensors, (block, 2), shape, dtype, *before)
        nested = (floats(256), floats(-(-blocks // 16)), floats(1))
        tensors = (packed, floats(16), bytes_of(blocks), *nested)
        both(four_bits, tensors, (block, 16), shape, dtype, *before)
        tensors = (bytes_of(*shape).view(torch.int8), floats(shape[0]))
        both(eight_bits, tensors, (1.0 / 127.0,), shape, dtype, *before)
        launched += 3
calls = record()
assert [each["call"] for each in calls] == ["cudaLaunchKernelEx"] * launched, calls
assert {kernel_of(each) for each in calls} == {"dequantize4bit", "dequantize8bit"}
assert {each["device"] for each in calls} == {1} and current_device() == 0 and last_error() == 0
"""


def test_a_weight_dequantised_on_cuda_has_the_bits_of_the_cpu():
    python(DEQUANTIZE)


def test_a_layer_on_a_quantised_base_dequantises_twice():
    """Once for each direction, with scales that are quantised, by one launch each."""
    python("""
from types import SimpleNamespace
from lora_ext.quantized import workspace
from lora_ext.quantized.linear import Call, _QuantizedLinear
from lora_ext.quantized.of_bitsandbytes import EightBitWeight, FourBitWeight

card(80, route="kernel")
there = torch.device("cuda", 1)
generator = torch.Generator().manual_seed(0)
n, k, rows, rank = 136, 96, 70, 8

# Of the function alone: autograd's engine would look for a device of torch's own.
class Context:
    needs_input_grad = (False, True, False, True, True)

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

def made(*shape):
    return 0.3 * torch.randn(shape, generator=generator)

def four_bits(device):
    generator.manual_seed(1)
    second = SimpleNamespace(
        code=made(256), absmax=made(1).abs(), blocksize=256, dtype=torch.float32
    )
    state = SimpleNamespace(
        shape=(n, k), dtype=torch.bfloat16, quant_type="nf4", blocksize=64, nested=True,
        code=made(16), absmax=torch.randint(0, 256, (n * k // 64,), generator=generator).byte(),
        offset=torch.tensor(0.5), state2=second,
    )
    for each in (second, state):
        for name, value in vars(each).items():
            if isinstance(value, torch.Tensor):
                setattr(each, name, value.to(device))
    packed = torch.randint(0, 256, (n * k // 2, 1), generator=generator).byte().to(device)
    return FourBitWeight(packed, state)

def eight_bits(device):
    generator.manual_seed(1)
    codes = torch.randint(-127, 128, (n, k), generator=generator).to(torch.int8)
    return EightBitWeight(codes.to(device), made(n).abs().to(device))

for weight, kernel in ((four_bits, "dequantize4bit"), (eight_bits, "dequantize8bit")):
    dense = weight("cpu").dequantize(torch.bfloat16)
    generator.manual_seed(2)
    x, a, b, grad = (made(*s).bfloat16() for s in ((rows, k), (rank, k), (n, rank), (rows, n)))
    wanted = [each.detach().clone().requires_grad_() for each in (x, a, b)]
    y = lora_ext.lora_linear(wanted[0], dense, *wanted[1:], scaling=2.0)
    y.backward(grad)
    given, quantized = [each.to(there) for each in (x, a, b)], weight(there)
    lora_ext.lora_linear(given[0], quantized, *given[1:], scaling=2.0)  # the kernels' checks
    record()
    context = Context()
    found = _QuantizedLinear.forward(
        context, Call(quantized, 2.0, 0.0, None), given[0], None, *given[1:]
    )
    forward = kernels(record())
    _, dx, _, da, db = _QuantizedLinear.backward(context, grad.to(there))
    backward = kernels(record())
    assert forward[0] == backward[0] == kernel and "gemm" in forward and "gemm" in backward
    assert (forward + backward).count(kernel) == 2, (forward, backward)
    results = [each.cpu() for each in (found, dx, da, db)]
    assert close(results, [y.detach(), *(each.grad for each in wanted)])
    assert workspace.nbytes(there) == 2 * n * k
assert last_error() == 0
""")


def test_dequantising_on_cuda_says_what_it_cannot_do():
    python("""
card(80)
there = torch.device("cuda", 1)
ops = torch.ops.lora_ext

def call(block=64, scale_block=None, table=there, cols=8):
    packed, scale = torch.zeros(4 * cols, dtype=torch.uint8, device=there), torch.zeros(1)
    out = torch.empty(8, cols, device=there)
    none = (None, None, None, 2)
    if scale_block is not None:
        scale = scale.byte()
        none = (torch.zeros(256).to(there), torch.zeros(1).to(there), torch.zeros(1).to(there))
        none = (*none, scale_block)
    scale = scale.to(there)
    ops.dequantize_4bit(packed, torch.zeros(16, device=table), scale, block, *none, out)

def refused(words, **options):
    with pytest.raises(RuntimeError, match=words):
        call(**options)

call()
refused("on CUDA a block that is a power of two from 32 on, but got 96", block=96)
refused("on CUDA a scale_block that is a power of two from 2 on, but got 6", scale_block=6)
refused("expected table on out's device, cuda:1, but got it on cpu", table="cpu")
fail("cudaLaunchKernelEx", 1, NO_IMAGE)
refused("dequantising on cuda:1 failed: no kernel image")
call()
assert settled() and current_device() == 0
""")


def test_a_device_that_cannot_run_them_is_left_to_the_library():
    python("""
from lora_ext.quantized import devices

card(80)
first, second = torch.device("cuda", 0), torch.device("cuda", 1)
with warnings.catch_warnings():
    warnings.simplefilter("error")
    torch.cuda.is_current_stream_capturing = lambda: True
    assert not devices.has_kernels(second)  # nobody may wait for a graph
    torch.cuda.is_current_stream_capturing = lambda: False
    fail("cudaLaunchKernelEx", 1, NO_IMAGE)
    assert not devices.has_kernels(first) and devices.has_kernels(second)
    assert not devices.has_kernels(first)  # it is asked once
    record()
    assert devices.has_kernels(second) and not record()
assert settled()
""")


@pytest.mark.parametrize("mutant", ["dequantize_lower_half_first", "dequantize_scale_fused"])
def test_kernels_that_dequantise_wrongly_are_not_used(mutant):
    python(f"""
from lora_ext.quantized import devices

card(80)
plant({mutant!r})
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert not devices.has_kernels(torch.device("cuda", 0))
assert "failed their check on cuda:0" in str(said[0].message)
""")


@pytest.mark.parametrize("mutant", [each.name for each in mutants.mutants_of_faults("cuda")])
def test_a_wrong_call_of_cuda_is_seen(mutant):
    calls = [asked(90, "kernel", "rank=40"), asked(80, "kernel", "rank=24"), FIRST_USE, DROPOUT]
    calls.insert(0 if mutant.startswith("dequantize") else len(calls), DEQUANTIZE)
    for code in calls:
        try:
            python(f"plant({mutant!r})\n{code}")
        except AssertionError:
            return
    pytest.fail("no call sees it")


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_cards_below_8_0_drop_on_the_library_route(dtype):
    python(
        f"""
card(75)
options = dict(rows=9, k=70, n=24, rank=4, dropout_p=0.25, dtype=torch.{dtype})
options |= dict(apart=3, between=7.0)
call = Call(**options)
_C.set_cpu_isa("library")
assert close(call.both(), Call(device=torch.device("cpu"), **options).both())
assert {{kernel_of(each) for each in record()}} == {{"dropout"}} and last_error() == 0
"""
        + """
if call.dtype in (torch.bfloat16, torch.float16):
    assert "need compute capability 8.0" in call.plan().forward.reason
"""
    )


# Calls that fail


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
assert count > 5, count
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
failing("cudaMemsetAsync", 1, OUT_OF_MEMORY, "out of memory")
failing("cudaMemsetAsync", 2, OUT_OF_MEMORY, "out of memory")
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
        ("cudaMemsetAsync", "LAUNCH_FAILURE"),
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


FEW_ROWS = """
there = torch.device("cuda", 1)
_C.set_cuda_route("kernel")

def asked(call):
    record()
    y, s = call.forward()
    calls = record()
    cleared = [each["bytes"] for each in calls if each["call"] == "cudaMemsetAsync"]
    return [y.cpu(), s.cpu()], kernels(calls), cleared
"""


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
    python(
        "card(90)\n"
        + FEW_ROWS
        + """
call = Call(rows=7, k=264, n=536, rank=16)
expected, _, _ = asked(call)
card(90, capturing=True)
for _ in range(3):
    results, launched, cleared = asked(call)
    assert launched == ["decode"] and cleared == [] and same(results, expected)
# A stream whose id CUDA does not say: in the workspace, cleared before.
card(90)
fail("cudaStreamGetId", 1, LAUNCH_FAILURE)
results, launched, cleared = asked(call)
assert launched == ["decode"] and cleared == [4 * (9 + 1 + 1)], (launched, cleared)
assert same(results, expected) and last_error() == 0
"""
    )


def test_a_stream_has_no_more_counts_than_it_says():
    """Those of a million columns; a launch for more has its own, in its workspace."""
    python("card(80)\nassert has_counts(1, 1 << 14) and not has_counts(1, (1 << 14) + 1)")


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
