"""How many plans take each CUDA kernel; `make sass` fails where a compiled kernel is at none.

    python scripts/census.py        a table of kernels and cards, of all that can be launched

Asks the planner for layers, rows, ranks, adapters, dropout, alignment and directions, for cards
that need not be here. A kernel at no plan costs compile time, checks and tests, and nobody runs it.
"""

import random
import re
import sys
from collections import Counter
from functools import cache

from lora_ext import _C
from lora_ext.kernels import CARDS as KNOWN

CARDS = {
    **KNOWN,
    "RTX 4090": _C.Card(89, 128, 102400, 101376),
    "H100 MIG": _C.Card(90, 16, 233472, 232448),
    "H100, code of 8.0": _C.Card(90, 132, 233472, 232448, sm90a_code=False),
}
# In and out features of the layers of models of 1 to 70 billion parameters, and odd ones.
LAYERS = [
    *[(768, 768), (768, 3072), (3072, 768), (1024, 1024), (2048, 512), (2048, 2048), (2048, 8192)],
    *[(8192, 2048), (4096, 1024), (4096, 4096), (4096, 11008), (11008, 4096), (4096, 14336)],
    *[(14336, 4096), (5120, 5120), (5120, 13824), (13824, 5120), (8192, 1024), (8192, 8192)],
    *[(8192, 28672), (28672, 8192), (4096, 128256), (4100, 4096), (1000, 4096), (4096, 1003)],
]
ROWS = [1, 4, 8, 13, 16, 32, 64, 100, 256, 512, 768, 1024, 1536, 2048, 4096, 8192, 16384, 65536]
RANKS = [1, 4, 8, 16, 24, 32, 64, 128, 256, 300]
PLANS = 3000  # of a card
# By how its name begins: kernels that no plan says, or that plans take where they are measured.
ELSEWHERE = {
    "dequantize_4bit": "launched for a quantised weight, whatever the plan",
    "dequantize_8bit": "launched for a quantised weight, whatever the plan",
    "lora_grouped_entries": "launched for a list of adapters, whatever the plan",
    **{
        f"lora_experts_{name}": "launched for a mixture's experts, whatever the plan"
        for name in ("count", "begin", "place", "routes", "factors", "sum", "dot")
    },
}
CANDIDATES = {"lora_gemm 128x128": "what warmup times on Ampere; on Hopper for ranks above 256"}


def reason(name: str) -> str:
    """Why a kernel is there that no plan takes; "" if nothing says so."""
    known = {**ELSEWHERE, **CANDIDATES}
    return next(
        (why for part, why in known.items() if name == part or name.startswith(part + " ")), ""
    )


def kernels_of(plan, problem, backward: bool, groups: int = 0, experts: bool = False) -> set[str]:
    """What a plan launches, as sass_kernels.py names it, without the type of x."""
    if not plan.kernel:
        return set()
    text, at = str(plan), _C.plan_numbers(plan)
    many = "lora_grouped" if groups else "lora"
    factors = " float" if groups and problem.float_adapters else ""
    named = _C.kernels_of(plan, problem, backward=backward).name
    element = " element" if "element-wise" in named else ""
    if plan.tile == "decode" and plan.blocks:
        return {f"lora_decode{' float' if problem.float_adapters else ''} {at['batch']}"}
    masked = " masked" if problem.dropout else ""
    orientation = " MN-major" if backward else ""
    found = {"lora_grouped_scan"} if groups else set()
    if groups and not experts:  # whose rows are sorted
        found |= {"lora_grouped_count", "lora_grouped_place"}
    if "lora_split" in text and not groups:
        found.add("lora_split")
    if plan.one_pass:
        found.add(f"lora_dsdb {16 if plan.columns <= 16 else 32}{element}")
    elif plan.shrink_splits:
        of_shrink = "" if experts else factors  # experts' are halves
        found.add(f"{many}_shrink{of_shrink}{orientation or masked}{element}")
    if f"{many}_reduce," in text:
        found.add(f"{many}_reduce")
    if plan.blocks and experts:
        by_rows = " MN-major" if backward == problem.weight_row_major else ""
        of_u = " U MN-major" if backward else ""
        variant = f"{by_rows}{of_u}{masked * backward}"
        found.add(gemm_of(plan, many, variant, named).replace("_gemm", "_gemm_own_weights"))
    elif plan.blocks:
        found.add(gemm_of(plan, many, factors + orientation + masked * backward, named))
    if f"{many}_wgrad," in text:
        found.add(f"{many}_wgrad{factors}{masked}{element}")
        found.add(f"{many}_reduce_wgrad{factors}")
    return found


def gemm_of(plan, many: str, variant: str, named: str) -> str:
    """Of a plan that has one, whose kernel set is `named`."""
    first, *_, columns = plan.tile.split()
    tile = f"128x{columns}"
    if plan.wgmma and many == "lora_grouped":
        return f"{many}_gemm_sm90a {tile}{variant}"
    if not plan.wgmma:
        return f"{many}_gemm {tile}{'x3' if first == 'deep' else ''}{variant}"
    tail = re.search(r"tail (\d)", named)[1]
    pingpong = " pingpong" if first == "pingpong" else ""
    return f"lora_gemm_sm90a {tile}{pingpong}{variant} tail {tail}"


def census(card: _C.Card, count: int = PLANS) -> Counter:
    """Of `count` plans of one card, how many take each kernel."""
    draw, found = random.Random(0), Counter()
    for _ in range(count):
        k, n = draw.choice(LAYERS)
        problem = _C.Problem(draw.choice(ROWS), n, k, draw.choice(RANKS))
        problem.float_adapters, problem.dropout = draw.random() < 0.5, draw.random() < 0.5
        problem.given_base = draw.random() < 0.05
        problem.aligned = problem.aligned_weight = problem.aligned_a = k % 8 == 0 and n % 8 == 0
        problem.aligned_b = problem.rank % 8 == 0
        if draw.random() < 0.1:  # frozen adapters, an input without a gradient
            problem.need_dx, problem.need_dlora_a = draw.choice([(True, False), (False, True)])
            problem.need_dlora_b = draw.random() < 0.5
        groups = draw.choice([0, 0, 0, 1, 8, 64])
        backward = draw.random() < 0.5
        plan = _C.plan_as_asked(card, problem, backward=backward, choice="auto", groups=groups)
        found.update(kernels_of(plan, problem, backward, groups))
        if groups:
            problem.weight_row_major, problem.given_base = draw.random() < 0.7, False
            asked = {"choice": "auto", "groups": groups, "own_weights": True}
            plan = _C.plan_as_asked(card, problem, backward=backward, **asked)
            found.update(kernels_of(plan, problem, backward, groups, experts=True))
    return found


def launched(card: _C.Card) -> set[str]:
    """All that the device's check runs on a card, which is all that a call can launch."""
    found = set()
    for kernels in [*_C.all_kernels(card, True), *_C.all_grouped_kernels(card)]:
        problem, plan = kernels.small_case(card)
        found |= kernels_of(plan, problem, kernels.backward, problem.groups, problem.own_weights)
    return found


def untaken(names: set[str]) -> list[str]:
    """Of compiled kernels, those at no plan of any card, without a reason."""
    at_some = taken()
    return sorted(name for name in names if untyped(name) not in at_some and not reason(name))


@cache
def taken() -> set[str]:
    """Kernels at some plan of some card."""
    return set().union(*map(census, CARDS.values()))


def untyped(name: str) -> str:
    """Without the type of x, which no plan asks for."""
    return re.sub(" (bf16|fp16)", "", name, count=1)


def main() -> None:
    found = {name: census(card) for name, card in CARDS.items()}
    print(f"of {PLANS} plans a card", *(f"| {name}" for name in found))
    for kernel in sorted(set().union(*found.values(), *map(launched, CARDS.values()))):
        print(kernel, *(f"| {counts[kernel]}" for counts in found.values()))


if __name__ == "__main__":
    sys.exit(main())
