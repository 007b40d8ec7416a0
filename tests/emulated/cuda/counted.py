"""In the package of build.py: what a call launches, asks of torch's library and reads on the host.

Nothing is run (counting.h), so that layers have the shapes of models. `python -m
emulated.cuda.counted` prints as JSON what scripts/count_launches.py makes a table of.
"""
# ruff: noqa: E402

import ctypes
import json
import sys
import sysconfig
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import prod
from typing import NamedTuple

# Before torch, so that device.cpp says for it which device has streams.
ctypes.CDLL(f"lora_ext/_C{sysconfig.get_config_var('EXT_SUFFIX')}")

import torch
from torch import Tensor
from torch.nn.functional import silu

from emulated.cuda import calls
from lora_ext import _C, lora_linear
from lora_ext.experts import Experts, ExpertsAdapter, lora_experts
from lora_ext.experts import devices as of_experts
from lora_ext.quantized import devices as of_codes
from lora_ext.quantized.codes import FourBits
from lora_ext.quantized.stack import QuantizedStack

# (major compute capability, SMs, clusters of two at a time) of each device.
CARDS = ((8, 108, 0), (9, 132, 66))
# One kernel for all groups; elsewhere torch loops over them, and reads on the host where they end.
GROUPED_MM_CARDS = (9, 10)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "NF4": torch.bfloat16}
RANK, BLOCK = 8, 64  # PEFT's, and bitsandbytes'
EXPERTS, HIDDEN, INNER, SLOTS = 128, 2048, 768, 8  # of Qwen3-30B-A3B
FEATURES = 4096
# What reads no more of its first operand than it writes.
GATHERS = ("index_select", "index", "gather", "_index_put_impl_", "embedding")


class Call(NamedTuple):
    """One launch of this package's kernels, or one op of torch's library that launches or reads.

    Attributes:
        kind: "kernel", "library" or "host", the last for a read of what is on the device, or a copy
            from or to the host, beside an entry of what it launches.
        name: the kernel's family, or the op.
        bytes: of its operands, each counted once.
    """

    kind: str
    name: str
    bytes: int


def distinct_bytes(tensor: Tensor) -> int:
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.itemsize * prod(size if stride else 1 for size, stride in sizes)


Used = dict[int, int]  # by the address of an operand its bytes


def calls_of(record: list[dict], groups: int = 1, share: float = 1.0) -> list[Call]:
    """The calls in their order.

    Args:
        groups: of the library's grouped product, where that is a loop.
        share: of the experts, that with rows: a launch reads no more of a stack of matrices.
    """
    readers = [event for event in record if event.get("op") == "aten::_grouped_mm"]
    of_ops = [event["operands"] for event in record if event["call"] == "op"]
    tensors = chain(*of_ops, *(event["given"] for event in readers))
    stacks = {address for address, _, matrices in tensors if matrices == EXPERTS}
    for event in record:  # what is dequantised beside the ends of experts' rows
        if event.get("op") == "lora_ext::dequantize" and event["call"] == "op":
            sizes = _sizes(event["operands"])
            stacks |= set(sizes) if 4 * EXPERTS in sizes.values() else set()

    def call(kind: str, name: str, used: Used) -> Call:
        shares = [(share if address in stacks else 1.0) * size for address, size in used.items()]
        return Call(kind, name, round(sum(shares)))

    found, memory, operands = [], Memory(record), {}
    for event in record:
        kind = event["call"]
        if kind == "op":
            operands = _sizes(event["operands"])
        elif kind == "cudaLaunchKernelEx":
            used = memory.used(event["addresses"], operands)
            found.append(call("kernel", calls.kernel_of(event), used))
        elif kind == "cudaMemsetAsync":
            found.append(Call("kernel", "clear", event["bytes"]))
        elif kind == "library":
            found += _of_library(event, groups, call)
    return found


def _sizes(tensors: list[list[int]]) -> Used:
    """Where two begin at one address, the larger."""
    return {address: size for size, address in sorted((size, at) for at, size, _ in tensors)}


def _of_library(event: dict, groups: int, call: Callable[[str, str, Used], Call]) -> list[Call]:
    op, given, results = event["op"].removeprefix("aten::"), event["given"], event["results"]
    times = groups if op == "_grouped_mm" else 1
    found = [Call("host", op, 0)] if event["host"] or times > 1 else []
    if op == "_local_scalar_dense" or not (given or results):  # nothing is launched
        return found
    used = _sizes(given) | _sizes(results)
    if op in GATHERS:
        others = _sizes(given[1:] if op.endswith("_") else results)
        used[given[0][0]] = min(given[0][1], max(others.values(), default=0))
    whole = call("library", op, used)
    return [*found, *(whole._replace(bytes=whole.bytes // times) for _ in range(times))]


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
        share: as of `calls_of`.
    """

    forward: Callable[[], Tensor]
    inputs: list[Tensor]
    needed: dict[str, int]
    share: float = 1.0

    def count(self, major: int) -> dict[str, list[Call]]:
        """By direction, the second time: what the first one sets up stays."""
        for _ in range(2):
            calls.record()
            out = self.forward()
            forward, grad = calls.record(), torch.empty_like(out)
            calls.record()
            torch.autograd.grad(out, self.inputs, grad)
            backward = calls.record()
        groups = 1 if major in GROUPED_MM_CARDS else EXPERTS
        both = {"forward": forward, "backward": backward}
        return {name: calls_of(record, groups, self.share) for name, record in both.items()}


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
    index, hit = chosen.to(device), len(chosen.unique())
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
    of_factors, share = sum(each.nbytes for each in factors), hit / EXPERTS
    needed = {
        "forward": round(of_rows + share * (stored + of_factors)),
        "backward": round(of_rows + share * stored + of_factors),
    }
    call = partial(lora_experts, layer, x, index, weights, adapters[:1], adapters[1:])
    return Case(call, [x, weights, *factors], needed, share)


CASES = {
    f"q_proj, {FEATURES} rows": partial(linear, rows=4096),
    "experts, 4096 tokens": partial(experts, tokens=4096),
    "experts, 1 token": partial(experts, tokens=1),
}


def begin() -> None:
    """From now on calls are counted, on the cards of `CARDS`, whose kernels count as checked."""
    majors = [major for major, *_ in CARDS]
    torch.cuda.get_device_capability = lambda device: (majors[torch.device(device).index], 0)
    torch.cuda.default_generators = tuple(torch.Generator() for _ in CARDS)
    calls.card(80)
    for number, (major, sms, clusters) in enumerate(CARDS):
        device = torch.device("cuda", number)
        calls.be_unlike(number, 10 * major, sms, clusters)
        card = _C.cuda_card(device)
        for kernels in (*_C.all_kernels(card, True), *_C.all_grouped_kernels(card)):
            _C.remember_check(device, kernels, "passed")
        of_experts._found[device] = of_codes._found[device] = True
    calls.count_only(1)


def main(names: Sequence[str]) -> None:
    begin()
    rows = []
    for name in names or CASES:
        for kind in DTYPES:
            for number, (major, *_) in enumerate(CARDS):
                calls.set_device(number)
                case = CASES[name](kind, torch.device("cuda", number))
                cell = {"layer": name, "kind": kind, "major": major}
                for direction, found in case.count(major).items():
                    needed = case.needed[direction]
                    rows.append(cell | {"direction": direction, "calls": found, "needed": needed})
    print(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
