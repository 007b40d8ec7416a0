"""In the package of build.py: what a call launches, asks of torch's library and reads on the host.

Nothing is run (counting.h), so that layers have the shapes of models. `python -m
emulated.cuda.counted` prints as JSON what scripts/count_launches.py makes a table of.
"""
# ruff: noqa: E402

import ctypes
import json
import os
import sys
import sysconfig
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from math import prod
from typing import NamedTuple

# Before torch, so that device.cpp says for it which device has streams.
ctypes.CDLL(f"lora_ext/_C{sysconfig.get_config_var('EXT_SUFFIX')}")

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, silu

from emulated.cuda import calls
from lora_ext import _C, lora_linear
from lora_ext.experts import Experts, ExpertsAdapter, lora_experts
from lora_ext.experts import devices as of_experts
from lora_ext.quantized import devices as of_codes
from lora_ext.quantized.codes import FourBits
from lora_ext.quantized.stack import QuantizedStack

# (compute capability times 10, SMs, clusters of two at a time) of each device: A100, H100.
CARDS = ((80, 108, 0), (90, 132, 66))
# One kernel for all groups; elsewhere torch loops over them, and reads on the host where they end.
GROUPED_MM_CARDS = (9, 10)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "NF4": torch.bfloat16}
RANK, BLOCK = 8, 64  # PEFT's, and bitsandbytes'
EXPERTS, HIDDEN, INNER, SLOTS = 128, 2048, 768, 8  # of Qwen3-30B-A3B
FEATURES = 4096
OPS = ("experts_product", "lora_grouped")  # whose products the planner prices
# By the family of a kernel with products its launch of the planner's.
PRODUCTS = {
    "groupedgemm": "lora_gemm",
    "ownweights": "lora_gemm",
    "gemm": "lora_gemm",  # on wgmma
    "groupedshrink": "lora_shrink",
    "groupedwgrad": "lora_wgrad",
    "decode": "lora_decode",
}
# What reads no more of its first operand than it writes.
GATHERS = ("index_select", "index", "gather", "_index_put_impl_", "embedding")


class Call(NamedTuple):
    """One launch of this package's kernels, or one op of torch's library that launches or reads.

    Attributes:
        kind: "kernel", "library" or "host", the last for a read of what is on the device, or a copy
            from or to the host, beside an entry of what it launches.
        name: the kernel's family, or the op.
        bytes: of its operands, each counted once.
        us: the planner's prediction.
    """

    kind: str
    name: str
    bytes: int
    us: float


def distinct_bytes(tensor: Tensor) -> int:
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.itemsize * prod(size if stride else 1 for size, stride in sizes)


Used = dict[int, int]  # by the address of an operand its bytes


class Routing(NamedTuple):
    """Whose rows are multiplied.

    Attributes:
        rows: of each expert.
        is_loop: whether the library's grouped product is a loop.
    """

    rows: Sequence[int] = ()
    is_loop: bool = False

    @property
    def share(self) -> float:
        """Of the experts, that with rows: a launch reads no more of a stack of matrices."""
        return sum(map(bool, self.rows)) / len(self.rows) if self.rows else 1.0


def calls_of(record: list[dict], card: _C.Card, routing: Routing) -> list[Call]:
    """The calls in their order."""
    readers = [event for event in record if event.get("op") == "aten::_grouped_mm"]
    of_ops = [event["operands"] for event in record if event["call"] == "op"]
    tensors = chain(*of_ops, *(event["given"] for event in readers))
    stacks = {address for address, _, sizes in tensors if len(sizes) == 3 and sizes[0] == EXPERTS}
    for event in record:  # what is dequantised beside the ends of experts' rows
        if event.get("op") == "lora_ext::dequantize" and event["call"] == "op":
            sizes = _sizes(event["operands"])
            stacks |= set(sizes) if 4 * EXPERTS in sizes.values() else set()

    def call(kind: str, name: str, used: Used) -> Call:
        shares = [(routing.share if at in stacks else 1.0) * size for at, size in used.items()]
        return Call(kind, name, round(sum(shares)), _C.Launch(sum(shares)).us(card))

    found, memory, operands, planned, launched = [], Memory(record), {}, {}, []
    for event in record:
        kind = event["call"]
        if kind == "op":
            _expect_launched(planned, launched)
            launched = []
            operands = _sizes(event["operands"])
            planned = planned_products(event, card, sum(routing.rows))
        elif kind == "cudaLaunchKernelEx":
            used, name = memory.used(event["addresses"], operands), calls.kernel_of(event)
            one = call("kernel", name, used)
            launched.append(name)
            known = planned.pop(PRODUCTS.get(name, ""), None)
            found.append(one._replace(us=known.us(card)) if known else one)
        elif kind == "cudaMemsetAsync":
            size = event["bytes"]
            found.append(Call("kernel", "clear", size, _C.Launch(size).us(card)))
        elif kind == "library":
            found += _of_library(event, card, routing, call)
    _expect_launched(planned, launched)
    return found


def _expect_launched(planned: dict[str, _C.Launch], launched: list[str]) -> None:
    """That what an op has launched has each base product of the planner's."""
    missed = {"lora_gemm", "lora_decode"} & planned.keys()
    if missed and launched:
        raise AssertionError(f"expected a launch of {PRODUCTS} for {missed}, but got {launched}")


def planned_products(event: dict, card: _C.Card, rows: int) -> dict[str, _C.Launch]:
    """By its name each launch with products that the planner has for an op of experts; a slice has
    its share of the base product."""
    op = event["op"].removeprefix("lora_ext::")
    matrices = [sizes for *_, sizes in event["operands"] if len(sizes) == 3]
    if op.removesuffix("_backward").removesuffix("_forward") not in OPS or not matrices:
        return {}
    *weight, lora_a, lora_b = matrices[: 3 if op.startswith("experts") else 2]
    problem = _C.Problem(rows, lora_b[1], lora_a[2], RANK)
    problem.float_adapters, problem.given_base = True, not weight
    words = {"choice": "auto", "groups": EXPERTS, "own_weights": bool(weight)}
    plan = _C.plan_as_asked(card, problem, backward=op.endswith("backward"), **words)
    found = {each.name: each for each in _C.predicted_launches(plan) if each.flop}
    if weight and weight[0][0] < EXPERTS:
        part, whole = weight[0][0] / EXPERTS, found["lora_gemm"]
        blocks = max(1, round(part * whole.blocks))
        slice_of = _C.Launch(part * whole.bytes, part * whole.flop, whole.share, blocks)
        found["lora_gemm"] = slice_of
    return found


def _sizes(tensors: list[list[int]]) -> Used:
    """Where two begin at one address, the larger."""
    return {address: size for size, address in sorted((size, at) for at, size, _ in tensors)}


def _of_library(
    event: dict, card: _C.Card, routing: Routing, call: Callable[[str, str, Used], Call]
) -> list[Call]:
    op, given, results = event["op"].removeprefix("aten::"), event["given"], event["results"]
    is_loop = op == "_grouped_mm" and routing.is_loop
    found = [Call("host", op, 0, 0.0)] if event["host"] or is_loop else []
    if op == "_local_scalar_dense" or not (given or results):  # nothing is launched
        return found
    used = _sizes(given) | _sizes(results)
    if op in GATHERS:
        others = _sizes(given[1:] if op.endswith("_") else results)
        used[given[0][0]] = min(given[0][1], max(others.values(), default=0))
    whole = call("library", op, used)
    if op != "_grouped_mm":
        return [*found, whole]
    _, depth, columns = given[1][2]
    products = [_C.library_product(card, rows, columns, depth) for rows in routing.rows if rows]
    if is_loop:
        size = whole.bytes // len(products)
        return [*found, *(whole._replace(bytes=size, us=each.us(card)) for each in products)]
    sums = (sum(getattr(each, name) for each in products) for name in ("bytes", "flop"))
    blocks = sum(each.blocks for each in products)
    return [*found, whole._replace(us=_C.Launch(*sums, blocks=blocks).us(card))]


class Memory:
    """What is at an address that a kernel is given."""

    def __init__(self, events: list[dict]) -> None:
        made = [event for event in events if event["call"] == "allocate"]
        self.begins = [event["address"] for event in made]
        self.ends = [event["address"] + event["bytes"] for event in made]
        given = [event for event in events if event["call"] == "cudaLaunchKernelEx"]
        self.given = sorted({address for event in given for address in event["addresses"]})

    def used(self, addresses: Sequence[int], operands: dict[int, int]) -> dict[int, int]:
        """By address, bytes: of an operand of the op, or else up to the next address that any
        kernel is given, as in a workspace."""
        found = {}
        for address in addresses:
            whole = [at for at, size in operands.items() if at <= address < at + size]
            if whole:
                found[max(whole)] = operands[max(whole)]
                continue
            place = bisect_right(self.begins, address) - 1
            if place < 0 or address >= self.ends[place]:
                continue
            later = self.given[bisect_right(self.given, address) :]
            found[address] = min([self.ends[place], *later[:1]]) - address
        return found


@dataclass
class Case:
    """A layer on one card.

    Attributes:
        forward: a call of it.
        inputs: those that have gradients.
        needed: by direction, bytes: activations or their gradients, W and factors of experts with
            rows, or gradients of all factors, once each.
        routing: of the rows.
        frozen: the layer without adapters, and its inputs that have gradients; of a linear layer
            None.
    """

    forward: Callable[[], Tensor]
    inputs: list[Tensor]
    needed: dict[str, int]
    routing: Routing = Routing()  # noqa: RUF009
    frozen: tuple[Callable[[], Tensor], list[Tensor]] | None = None

    def count(self, of_frozen: bool = False) -> dict[str, list[Call]]:
        """By direction, the second time: what the first one sets up stays."""
        call, inputs = (self.forward, self.inputs) if not of_frozen else self.frozen
        for _ in range(2):
            calls.record()
            out = call()
            forward, grad = calls.record(), torch.empty_like(out)
            calls.record()
            torch.autograd.grad(out, inputs, grad)
            backward = calls.record()
        card, both = _C.cuda_card(out.device), {"forward": forward, "backward": backward}
        return {name: calls_of(record, card, self.routing) for name, record in both.items()}


def four_bits(shape: tuple[int, ...], device: torch.device) -> FourBits:
    count = prod(shape)
    codes = torch.empty(count // 2, dtype=torch.uint8, device=device)
    scale = torch.empty(count // BLOCK, device=device)
    table = torch.empty(16, device=device)
    return FourBits(codes, scale, None, "nf4", table, BLOCK, shape, torch.bfloat16)


def linear(kind: str, device: torch.device, rows: int) -> Case:
    """q_proj of 4096 features with PEFT's defaults: factors in float32."""
    dtype = DTYPES[kind]
    new = partial(torch.empty, device=device)
    x = new(rows, FEATURES, dtype=dtype, requires_grad=True)
    a, b = new(RANK, FEATURES, requires_grad=True), new(FEATURES, RANK, requires_grad=True)
    shape = (FEATURES, FEATURES)
    weight = four_bits(shape, device) if kind == "NF4" else new(shape, dtype=dtype)
    sizes = sum(map(distinct_bytes, weight.tensors() if kind == "NF4" else [weight]))
    once = 2 * x.nbytes + sizes + a.nbytes + b.nbytes  # y is as large as x
    needed = {"forward": once, "backward": once}
    return Case(lambda: lora_linear(x, weight, a, b), [x, a, b], needed)


def gate(z: Tensor) -> Tensor:
    first, up = z.chunk(2, dim=-1)
    return silu(first) * up


def experts(kind: str, device: torch.device, tokens: int) -> Case:
    """A layer of Qwen3-30B-A3B's experts, adapted as PEFT does."""
    dtype, rows = DTYPES[kind], tokens * SLOTS
    new = partial(torch.empty, device=device)
    torch.manual_seed(0)
    chosen = torch.rand(tokens, EXPERTS).topk(SLOTS).indices
    index, rows_of = chosen.to(device), chosen.flatten().bincount(minlength=EXPERTS).tolist()
    x = new(tokens, HIDDEN, dtype=dtype, requires_grad=True)
    weights = new(tokens, SLOTS, dtype=dtype, requires_grad=True)
    made, adapters, stored = [], [], 0
    for out, inner in ((2 * INNER, HIDDEN), (HIDDEN, INNER)):
        shape = (EXPERTS, out, inner)
        if kind == "NF4":
            made.append(QuantizedStack(four_bits(shape, device)))
        else:
            made.append(new(shape, dtype=dtype))
        stored += sum(map(distinct_bytes, made[-1].tensors() if kind == "NF4" else made[-1:]))
        a = new(EXPERTS * RANK, inner, requires_grad=True)
        b = new(out, RANK * EXPERTS, requires_grad=True)
        adapters.append(ExpertsAdapter(a, b, 1.0))
    layer = Experts(*made, gate)
    factors = [each for adapter in adapters for each in adapter[:2]]
    of_rows = (tokens * HIDDEN + rows * (2 * INNER + INNER + HIDDEN)) * dtype.itemsize  # x, z, h, y
    of_factors, share = sum(each.nbytes for each in factors), Routing(rows_of).share
    needed = {
        "forward": round(of_rows + share * (stored + of_factors)),
        "backward": round(of_rows + share * stored + of_factors),
    }
    call = partial(lora_experts, layer, x, index, weights, adapters[:1], adapters[1:])
    # On meta torch's grouped product takes no other half.
    as_bfloat16 = [each.detach().view(torch.bfloat16) for each in (x, weights)]
    inputs = [each.requires_grad_() for each in as_bfloat16]
    stacks = [each if kind == "NF4" else each.view(torch.bfloat16) for each in made]
    frozen = partial(as_transformers, inputs[0], index, inputs[1], stacks)
    is_grouped = (
        torch.cuda.get_device_capability(device)[0] in GROUPED_MM_CARDS and dtype == torch.bfloat16
    )
    routing = Routing(rows_of, not is_grouped)
    return Case(call, [x, weights, *factors], needed, routing, (frozen, inputs))


class _Twice(torch.autograd.Function):
    """Dequantises stacks, and in backward once more."""

    @staticmethod
    def forward(ctx, x: Tensor, *stacks: QuantizedStack) -> Tensor:
        ctx.stacks = stacks
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        for stack in ctx.stacks:
            stack.codes.dequantize(stack.dtype)
        return grad, *(None for _ in ctx.stacks)


def as_transformers(
    x: Tensor, index: Tensor, weights: Tensor, stacks: Sequence[Tensor | QuantizedStack]
) -> Tensor:
    """The frozen layer by grouped products; all quantised experts are dequantised each way."""
    if isinstance(stacks[0], QuantizedStack):
        x = _Twice.apply(x, *stacks)
        stacks = [stack.codes.dequantize(stack.dtype) for stack in stacks]
    numbers, order = index.flatten().sort()
    every = torch.arange(EXPERTS, device=x.device)
    ends = torch.searchsorted(numbers, every, right=True).int()
    up, down = (partial(grouped_mm, mat_b=each.transpose(1, 2), offs=ends) for each in stacks)
    y = down(gate(up(x[order // index.shape[1]]))) * weights.flatten()[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=x.device)
    return y[back].view(*index.shape, -1).sum(1)


CASES = {
    f"q_proj, {FEATURES} rows": partial(linear, rows=4096),
    "experts, 4096 tokens": partial(experts, tokens=4096),
    "experts, 1 token": partial(experts, tokens=1),
}


def begin() -> None:
    """From now on calls are counted, on the cards of `CARDS`, whose kernels count as checked."""
    archs = [arch for arch, *_ in CARDS]
    torch.cuda.get_device_capability = lambda device: divmod(archs[torch.device(device).index], 10)
    torch.cuda.default_generators = tuple(torch.Generator() for _ in CARDS)
    calls.card(80)
    for number, (arch, sms, clusters) in enumerate(CARDS):
        device = torch.device("cuda", number)
        calls.be_unlike(number, arch, sms, clusters)
        card = _C.cuda_card(device)
        for kernels in (*_C.all_kernels(card, True), *_C.all_grouped_kernels(card)):
            _C.remember_check(device, kernels, "passed")
        of_experts._found[device] = of_codes._found[device] = True
    calls.count_only(1)


def main(names: Sequence[str]) -> None:
    begin()
    rows = []
    for name in names or CASES:
        for kind, (number, (arch, *_)) in product(DTYPES, enumerate(CARDS)):
            calls.set_device(number)
            case = CASES[name](kind, torch.device("cuda", number))
            frozen = case.count(of_frozen=True) if case.frozen else {}
            for direction, found in case.count().items():
                cell = {"layer": name, "kind": kind, "arch": arch, "direction": direction}
                cell |= {"calls": found, "needed": case.needed[direction]}
                rows.append(cell | {"frozen": frozen.get(direction, [])})
    print(json.dumps(rows), flush=True)
    os._exit(0)  # a thread of autograd may still need Python when that ends


if __name__ == "__main__":
    main(sys.argv[1:])
