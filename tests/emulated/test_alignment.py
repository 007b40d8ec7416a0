"""Operands as views of others, one at a time, through the package's own launch: in emulation.

A copy of 16 bytes from elsewhere is an error of the layer, and so is a tensor map of rows that
overlap; and the plan shows whether rows that may be copied so are.
"""

import pytest

from emulated import mutants
from emulated.package.child import python

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("package")]

CASES = """
_C.set_cuda_route("kernel")
lora_ext.kernels.set_pdl(False)
M, K, N = 70, 96, 136
ROWS = {"x": (M, K), "grad": (M, N), "weight": (N, K), "lora_a": (16, K), "lora_b": (N, 16)}
def forward(x, weight, a, b):
    return torch.ops.lora_ext.lora_forward(x, weight, None, a, b, 2.0)

def backward(grad, x, weight, a, b, s):
    inputs = (x, weight, None, a, b, 2.0)
    return torch.ops.lora_ext.lora_backward(grad, s, [True, True, True, False], *inputs)[:3]


def numbers(shape, seed):
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.mul_(0.3).to(torch.bfloat16)

# A view with the numbers of a tensor, and whether its rows are whole chunks that lie apart.
def pitched(tensor, by):
    rows, columns = tensor.shape
    storage = torch.zeros(rows, columns + by, dtype=tensor.dtype)
    storage[:, :columns] = tensor
    return storage[:, :columns], (columns + by) % 8 == 0

def sliced(tensor, at):
    rows, columns = tensor.shape
    storage = torch.zeros(rows, columns + 8, dtype=tensor.dtype)
    storage[:, at : at + columns] = tensor
    return storage[:, at : at + columns], at == 0

def one_row(tensor):
    return tensor[:1].expand(tensor.shape), False

def overlapping(tensor):
    rows, columns = tensor.shape
    storage = tensor.reshape(-1)[: 8 * (rows - 1) + columns].clone()
    return storage.as_strided((rows, columns), (8, 1)), False

VIEWS = [(pitched, by) for by in (1, 4, 8, 264)] + [(sliced, at) for at in range(8)]
VIEWS += [(one_row,), (overlapping,)]

def check(names, view, sizes=ROWS):
    given = {each: numbers(shape, seed) for seed, (each, shape) in enumerate(sizes.items())}
    make, *how = view
    fully = {each: given[each].shape[1] % 8 == 0 for each in given}
    for name in names:
        given[name], fully[name] = make(given[name], *how)
    x, grad, weight, a, b = (given[each] for each in ROWS)
    what = (names, make.__name__, *how)
    y, s = forward(x, weight, a, b)
    got = (y, *backward(grad, x, weight, a, b, s))
    wide = [each.double() for each in (x, weight, a, b)]
    y, s = forward(*wide)
    grads = backward(grad.double(), *wide, s)
    for one, other in zip(got, (y, *grads)):
        assert (one.double() - other).abs().max() <= 2**-6 * other.abs().max(), what
    operands = (x, weight, a, b, 0.0)
    plans = [_C.explain_forward(*operands), _C.explain_backward(*operands, grad)]
    assert all(plan.check == "passed" for plan in plans), what
    said = [(str(plan.plan), _C.plan_numbers(plan.plan)) for plan in plans]
    # Rows of results are as long as those of weight, or as weight has.
    vector = [
        fully["x"] and y.shape[1] % 8 == 0,
        fully["x"] and fully["grad"] and x.shape[1] % 8 == 0,
    ]
    for (text, at), expected in zip(said, vector):
        assert ("element-wise" not in text) == expected, (what, text)
        assert text.startswith("kernels: ") == (expected and fully["weight"]), (what, text)
        # lora_decode, which few rows take, reads both where they are.
        assert (at.get("a", -1) >= 0) == (not fully["lora_a"]), (what, text)
        assert (at.get("b", -1) >= 0) == (not fully["lora_b"]), (what, text)
"""


@pytest.mark.parametrize("arch", ["80", "90"])
@pytest.mark.parametrize("name", ["x", "grad", "weight", "lora_a", "lora_b"])
def test_one_operand_at_a_time_lies_otherwise(name, arch):
    python(f"{CASES}\nfor view in VIEWS: check([{name!r}], view)", arch)


# Whole chunks apart, though no row of a result would be.
ODD = """
odd = {"x": (M, 93), "grad": (M, N), "weight": (N, 93), "lora_a": (16, 93), "lora_b": (N, 16)}
for names in (["x"], ["weight"], ["lora_a"], ["x", "weight"], ["x", "weight", "lora_a"]):
    check(names, (pitched, 3), odd)
odd = {"x": (M, K), "grad": (M, 131), "weight": (131, K), "lora_a": (16, K), "lora_b": (131, 16)}
check(["grad"], (pitched, 5), odd)
"""


@pytest.mark.parametrize("arch", ["80", "90"])
def test_an_odd_number_of_columns_in_rows_of_whole_chunks(arch):
    python(CASES + ODD, arch)


@pytest.mark.parametrize("mutant", [each.name for each in mutants.mutants_of_faults("package")])
def test_a_wrong_alignment_is_seen(mutant):
    each = "for name in ROWS: check([name], (sliced, 1))"
    with pytest.raises(AssertionError):
        python(f"{CASES}\n{each}\n{ODD}", LORA_EXT_EMULATED_FAULT=mutant)


# Rows of three adapters and of none, in a list or a pool, whose tensors are those of CASES three
# times over. Rows of a pool's tensors lie as if they were of one matrix.
MANY = """
RANKS, ADAPTERS = (16, 12, 5), 3
index = (torch.arange(M) * 7 % 5 - 1).clamp(max=2).int()
scaling, kinds = torch.tensor([2.0, 0.5, 1.0]), {"list": ADAPTERS, "pool": 1}

def factors_of(kind, matrix, ranks):  # of [rows of all adapters, columns]
    each = matrix.unflatten(0, (ADAPTERS, -1))
    return [each] if kind == "pool" else [own[r] for own, r in zip(each, ranks)]

def run(kind, grad, x, weight, a, b):
    a = factors_of(kind, a, [slice(r) for r in RANKS])
    b = factors_of(kind, b, [(slice(None), slice(r)) for r in RANKS])
    ranks = torch.tensor(RANKS).int() if kind == "pool" else None
    inputs = (x, weight, None, a, b, scaling, index, None, ranks)
    y, s = torch.ops.lora_ext.lora_grouped_forward(*inputs)
    wanted = [True] * kinds[kind]
    dx, da, db, _ = torch.ops.lora_ext.lora_grouped_backward(
        grad, s, [True, False], wanted, wanted, *inputs
    )
    return y, dx, *da, *db

def check_many(names, view, sizes=ROWS, kind="list"):
    shapes = {
        each: (ADAPTERS * rows if each.startswith("lora") else rows, columns)
        for each, (rows, columns) in sizes.items()
    }
    given = {each: numbers(shape, seed) for seed, (each, shape) in enumerate(shapes.items())}
    make, *how = view
    for name in names:
        given[name], _ = make(given[name], *how)
    operands = [given[each] for each in ("grad", "x", "weight", "lora_a", "lora_b")]
    expected = run(kind, *(each.double() for each in operands))
    for one, other in zip(run(kind, *operands), expected, strict=True):
        off = (one.double() - other).abs().max()
        assert off <= 2**-6 * other.abs().max(), (kind, names, make.__name__, *how)

def check_all_many(kind):
    views = [(pitched, 1), (pitched, 8), (sliced, 1), (sliced, 4), (one_row,), (overlapping,)]
    for name in ROWS:
        for view in views:
            check_many([name], view, kind=kind)
    passed = check_results("cpu")
    assert set(passed.values()) == {"passed"} and all("many adapters" in each for each in passed)
    assert len({"element-wise" in each for each in passed}) == 2, passed
"""
ODD_MANY = ODD.replace("check(", "check_many(")


@pytest.mark.parametrize("kind", ["list", "pool"])
def test_an_operand_of_many_adapters_lies_otherwise(kind):
    python(f"{CASES}{MANY}check_all_many({kind!r})")


@pytest.mark.parametrize("kind", ["list", "pool"])
def test_many_adapters_with_an_odd_number_of_columns_in_rows_of_whole_chunks(kind):
    odd = ODD_MANY.replace(", odd)", f", odd, {kind!r})")
    python(CASES + MANY + odd)


@pytest.mark.parametrize("mutant", ["backward_without_aligned_dx", "aligned_without_the_pointer"])
def test_a_wrong_alignment_is_seen_with_many_adapters(mutant):
    each = "for name in ROWS: check_many([name], (sliced, 1))"
    with pytest.raises(AssertionError):
        python(f"{CASES}{MANY}{each}\n{ODD_MANY}", LORA_EXT_EMULATED_FAULT=mutant)


# Of one row, the stride is any number.
@pytest.mark.parametrize("arch", ["80", "90"])
def test_one_row_has_no_pitch(arch):
    python(
        CASES
        + """
one = {**ROWS, "x": (1, K), "grad": (1, N)}
def strided(tensor, by):
    return tensor.as_strided(tensor.shape, (by, 1)), True
for name in ("x", "grad"):
    for by in (0, 1, 8, 96):
        check([name], (strided, by), one)
""",
        arch,
    )
