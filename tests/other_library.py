"""Another library for a test run: torch's own products on the CPU round otherwise in each call.

Two products of a library have the same bits only where call, sizes, strides and alignment are the
same. On the processor where a test was written they may have them in other cases, too. With
`pytest --other-library SEED` mm, bmm, addmm, baddbmm, addmv and dot, in place and with `out`, and
what torch makes of them (mv, linear, matmul, einsum, addbmm), from Python and from C++, are sums of
two products: the summed dimension is cut in two, sometimes the rows are taken from the last to the
first, and with few columns odd rows are cut elsewhere, as by MKL on an AMD EPYC. All that is drawn
from the seed, the op, and the operands' sizes, strides, dtypes and addresses modulo 64: the same
call has the same bits. float16 and bfloat16 are summed in float32 and rounded once.

The rest is torch's: attention, convolutions and RNNs, whatever is not dense or not float, errors.
"""

import random
import warnings
from collections import Counter
from contextlib import contextmanager
from itertools import zip_longest

import torch
from torch import Tensor

# Op -> the factors' dimensions, and its forms.
PRODUCTS = {
    "mm": (2, 2, ("", ".out")),
    "bmm": (3, 3, ("", ".out")),
    "dot": (1, 1, ("",)),
    "addmm": (2, 2, ("", ".out", "_")),
    "baddbmm": (3, 3, ("", ".out", "_")),
    "addmv": (2, 1, ("", ".out", "_")),
}
HALVES = (torch.float16, torch.bfloat16)

# With fewer columns odd rows are apart. MKL 2024.2 on an EPYC: at 9, not at 16, 70 or 512.
FEW_COLUMNS = 16


def layout(tensor: Tensor) -> tuple:
    """A dimension of one element has any stride."""
    strides = [at for at, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    return tuple(tensor.shape), strides, tensor.dtype, tensor.data_ptr() % 64


def shape_of(name: str, a: Tensor, b: Tensor, *start: Tensor) -> tuple[int, ...] | None:
    """The result's shape; None for what is left to torch: errors, and where nothing can be cut."""
    summed = max(b.dim() - 2, 0)
    shape = (*a.shape[:-1], *b.shape[summed + 1 :])
    if (
        (a.dim(), b.dim()) != PRODUCTS[name][:2]
        or not a.is_floating_point()
        or any(t.dtype != a.dtype or t.layout != torch.strided for t in (a, b, *start))
        or (*a.shape[:summed], a.shape[-1]) != b.shape[: summed + 1]
        or a.shape[-1] < 2
        or 0 in shape
    ):
        return None
    sizes = [pair for t in start for pair in zip_longest(t.shape[::-1], shape[::-1])]
    return shape if all(own in (None, 1, size) for own, size in sizes) else None


def in_two(real, draw: random.Random, shape: tuple, a: Tensor, b: Tensor, *start: Tensor) -> Tensor:
    """real(*start, a, b), rounded otherwise."""
    rows, length = a.dim() - 2, a.shape[-1]
    start = [one.expand(shape) for one in start]
    turned = rows >= 0 and draw.random() < 0.5
    if turned:
        a, *start = (t.flip(rows) for t in (a, *start))

    def cut() -> Tensor:
        at = draw.randrange(1, length)
        a1, a2 = a[..., :at], a[..., at:]
        b1, b2 = b.split([at, length - at], max(b.dim() - 2, 0))
        if start:
            return real(real(*start, a1, b1), a2, b2, beta=1)
        return real(a1, b1) + real(a2, b2)

    result = cut()
    if rows >= 0 and (b.dim() == 1 or shape[-1] < FEW_COLUMNS):
        result.transpose(0, rows)[1::2] = cut().transpose(0, rows)[1::2]
    return result.flip(rows) if turned else result


@contextmanager
def other_library(seed: int):
    """For the block; yields a count of the ops that rounded otherwise."""
    calls: Counter[str] = Counter()

    def kernel_of(name: str, form: str):
        plain, own = (torch.library.get_kernel(f"aten::{name}{f}", "CPU") for f in ("", form))

        def product(keys, *args, out=None, **factors):
            def real(*given, **more):
                return plain.call_boxed(keys, *given, **(factors | more))

            *start, a, b = args
            shape = shape_of(name, a, b, *start)
            if shape is not None:
                seen = [layout(t) for t in args]
                if out is not None and not (out.is_contiguous() and out.data_ptr() % 64 == 0):
                    seen.append(layout(out))
                draw = random.Random(f"{seed} {name} {seen}")
                wide = torch.float32 if a.dtype in HALVES else a.dtype
                result = in_two(real, draw, shape, *(t.to(wide) for t in (a, b, *start)))
                result = result.to(a.dtype)
                calls[name + form] += 1
                if not form:
                    return result
            # The real call has the errors of `out`, and makes it as large as it must be.
            into = factors if out is None else {**factors, "out": out}
            whole = own.call_boxed(keys, *args, **into)
            return whole if shape is None else whole.copy_(result)

        def kernel(keys, *args, **given):
            with torch._C.DisableTorchFunction():
                return product(keys, *args, **given)

        return kernel

    with torch.library._scoped_library("aten", "IMPL") as library, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a kernel is replaced
        for name, (*_, forms) in PRODUCTS.items():
            for form, kernel in [(form, kernel_of(name, form)) for form in forms]:
                library.impl(name + form, kernel, "CPU", with_keyset=True)
        yield calls
