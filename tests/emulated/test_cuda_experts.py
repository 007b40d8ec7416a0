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
few, many = launched[:5], launched[5:]
assert few == ["expertssort", *(2 * ["expertsfactors"]), "expertssum", "expertsdot"], launched
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
perm, _, place, offs = (each.to(there) for each in ops.experts_routes(index.to(there), 3))
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
