"""The ops around the products of experts on our CUDA runtime: values, launches, refusals."""

from emulated.cuda.scripts import EXPERTS, ON_CUDA, RUNS_CUDA, python

pytestmark = RUNS_CUDA


def test_values_and_launches_on_cuda():
    python(
        ON_CUDA
        + "record()\n"
        + EXPERTS
        + """
launched = kernels(record())
few, many = launched[:7], launched[7:]
assert few == ["expertssort", *(4 * ["expertsfactors"]), "expertssum", "expertsdot"], launched
assert many == [*(2 * ["expertssort"]), *few], launched
assert last_error() == 0 and current_device() == 0
"""
    )


def test_they_say_what_they_cannot_do():
    python(
        ON_CUDA
        + """
ops = torch.ops.lora_ext
index, rows = torch.zeros(6, 2, dtype=torch.long), torch.zeros(12, 8, dtype=torch.float16)
perm, _, place, offs, _ = (each.to(there) for each in ops.experts_routes(index.to(there), 3))
weights = torch.zeros(6, 2)
a, b = torch.zeros(6, 8), torch.zeros(5, 6)


def on(given):
    if isinstance(given, list):
        return [on(each) for each in given]
    return given.to(there) if isinstance(given, torch.Tensor) else given

def refused(words, op, *given, error=RuntimeError, **named):
    with pytest.raises(error, match=words):
        op(*on(list(given)), **named)

def routes(words, index, experts=3, **how):
    refused(words, ops.experts_routes, index, experts, **how)

def pools(words, a=a, b=b, experts=3, dtype=torch.float16, terms=1, offs=None, **how):
    refused(words, ops.experts_factors, [a], [b], [1.0], experts, dtype, terms, offs, **how)

def summed(words, rows=rows, place=place, weights=None, slots=2, **how):
    refused(words, ops.experts_sum, rows, place, offs, weights, slots, **how)

def dot(words, dx=rows, grad=None, bias=None):
    named = dict(grad=on(grad), bias=on(bias))
    refused(words, ops.experts_dot, rows, dx, perm, offs, weights, 2, **named)

routes("top_k_index in Long or Int, but got Short", index.short(), error=TypeError)
routes("of shape .tokens, k. of at least one expert, but got .2. of 3", index[0])
routes("at least one expert, but got .6, 2. of 0", index, 0)
pools("lora_a of shape .4, 8., contiguous, but got shape .6, 8.", experts=4)
pools("lora_b of shape .5, 6., contiguous, but got shape .5, 9.", b=torch.zeros(5, 9))
pools("lora_a in Float or Half, but got Double", a=a.double(), error=TypeError)
pools("dtype bfloat16 or float16, but got Float", dtype=torch.float32, error=TypeError)
pools("1 or 2 terms, but got 3", terms=3)
pools("a rank above 0, but got 0", a=a[:0], b=b[:, :0])
pools("offs of shape .3.", offs=offs[:2])
def low_rank(words, x=rows[:6], a=a, experts=3, offs=offs, x_rows=perm, **how):
    refused(words, ops.experts_low_rank, x, [a], [b], [1.0], 1.0, experts, 1, offs, x_rows, **how)

low_rank("x of shape .6, 8., contiguous along its rows, but got shape .6, 4.", rows[:6, :4])
low_rank("dtype bfloat16 or float16, but got Float", rows.float(), error=TypeError)
low_rank("lora_a of shape .4, 8., contiguous, but got shape .6, 8.", experts=4)
low_rank("offs of shape .3.", offs=offs[:2])
low_rank("x_rows in Int, but got Long", x_rows=perm.long(), error=TypeError)
summed("rows in bfloat16 or float16, but got Float", rows.float(), error=TypeError)
summed("place of shape .12., contiguous, but got shape .5.", place=place[:5])
summed("place in Int, but got Long", place=place.long(), error=TypeError)
summed("rows of tokens with 5 slots each, but got 12", slots=5)
summed("weights of shape .6, 2., contiguous, but got shape .2, 2.", weights=weights[:2])
summed("weights in Float or Half, but got Double", weights=weights.double(), error=TypeError)
dot("dx of shape .12, 8., contiguous along its rows, but got shape .12, 4.", rows[:, :4])
dot("both of grad and bias", grad=rows)
dot("grad of shape .6, 8., contiguous along its rows, but got", grad=rows, bias=rows[:3])
dot("bias of shape .3, 8., contiguous along its rows, but got", grad=rows[:6], bias=rows)
with pytest.raises(RuntimeError, match="expected place on cuda:1, but got it on cpu"):
    ops.experts_sum(on(rows), place.cpu(), offs, None, 2)
fail("cudaLaunchKernelEx", 1, NO_IMAGE)
summed("launching the kernels on cuda:1 failed: no kernel image")
assert settled()
"""
    )


def test_of_quantised_experts_without_rows_nothing_is_written_or_read():
    """In memory that is NaN before, by slices of two."""
    python(
        ON_CUDA
        + """
from lora_ext.experts import by_kernels
from lora_ext.experts.expert_groups import Rows
from lora_ext.experts.operands import Gradient, Projection
from lora_ext.experts.routing import routes_of
from lora_ext.quantized import stack, workspace
from lora_ext.quantized.codes import FourBits, ScaledCodes

torch.manual_seed(0)
experts, n, k, half = 5, 40, 24, torch.bfloat16
stack.SLICE_BYTES = 2 * 2 * n * k

def on(*shape):
    return torch.rand(shape).to(there)

codes = torch.randint(256, (experts * n * k // 2,)).byte().to(there)
four_bits = FourBits(
    codes, on(experts * n * k // 32), None, "nf4", on(16), 32, (experts, n, k), half
)
eight = torch.randint(-128, 128, (experts, n, k)).to(torch.int8).to(there)
eight_bits = ScaledCodes(eight, on(experts, n, 1), None, half)
routes = routes_of(torch.tensor([[3, 1]]).to(there), experts)  # of one token
x, grad = on(2, k).to(half), on(1, n).to(half)
a, b, weights = on(experts * 3, k), on(n, 3 * experts), on(2)

launched = []
def step(weight):
    call = Projection(weight, None, routes, [a], [b], (2.0,), slots=2)
    record()
    y, s = by_kernels.forward(x, Rows(call, None))
    launched.append(kernels(record()))
    gradient = Gradient(grad, weights, s, True, [True], [True])
    found = by_kernels.backward(gradient, x, Rows(call, None))
    launched.append(kernels(record()))
    return [each.cpu() for each in (y, s, found.dx, found.dweights, *found.dlora_a, *found.dlora_b)]

for codes in (four_bits, eight_bits):
    dense = codes.dequantize(half).cpu()
    given = dense.clone()
    given[[0, 2, 4]] = float("nan")
    expected = [step(given.to(there)) for _ in range(2)][1]  # the kernels' checks are before
    assert launched[-2] == ["expertsfactors", "ownweights"], launched
    assert launched[-1] == [
        *("expertsfactors", "groupedshrink", "groupedreduce", "ownweights"),
        *("groupedwgrad", "groupedreducewgrad", "expertsdot"),
    ], launched
    assert not any(each.isnan().any() for each in expected)
    workspace.release()
    workspace.give(torch.full((2 * n * k,), float("nan")).to(half).to(there))
    assert same(step(stack.QuantizedStack(codes)), expected)
    of_codes = [each for found in launched[-2:] for each in found if "dequantize" in each]
    assert len(of_codes) == 2 * 3, launched
    first, second = workspace.take(2 * n * k, x).cpu().view(2, n, k)
    assert first.isnan().all() and torch.equal(second, dense[3])

def refused(words, **given):
    out = torch.empty(experts * n, k).to(there)
    given = {"offs": routes.offs, "experts": experts} | given
    with pytest.raises(RuntimeError, match=words):
        ops.dequantize("8bit", eight, on(experts * n), out, block=k, **given)

ops = torch.ops.lora_ext
refused("expected offs on out's device, cuda:1, but got it on cpu", offs=routes.offs.cpu())
refused("whole matrices of experts that offs has, but got 5 from 1 on", first=1)
refused("whole matrices of experts that offs has, but got 8 from 0 on", experts=8)
for count in (0, 3):
    words = f"expected out of {count} matrices of whole rows, but got shape .200, 24."
    refused(words, experts=count)
"""
    )
