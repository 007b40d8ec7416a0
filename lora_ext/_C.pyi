from collections.abc import Sequence

import torch

# What the functions do is said where csrc/ declares them: of panels in cpu/panel_choice.h, brgemm.h
# and driver.h, of instruction sets in cpu/dispatch.h, of plans in kernels/plan/, of checks in
# op/check/kernel_check.h, of explanations in op/route/route.h. What only tests and benchmarks call
# is not listed.

with_cuda: bool

def cpu_isa() -> str: ...
def available_cpu_isas() -> list[str]: ...
def set_cpu_isa(name: str) -> None: ...

cpu_panel_rows: int
max_rank: int

def cpu_panels(x_dtype: torch.dtype, batch_invariant: bool = False) -> torch.dtype | None: ...
def cpu_panels_of(
    x_dtype: torch.dtype, depth: int, cols: int, transposed: bool, rows: int
) -> torch.dtype | None: ...
def set_cpu_panels(name: str) -> None: ...
def cpu_product(
    p: torch.Tensor,
    q: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    panels: str | None = None,
) -> None: ...
def cpu_panel_candidates(x_dtype: torch.dtype) -> list[torch.dtype]: ...
def set_measured_panels(
    x_dtype: torch.dtype,
    depth: int,
    cols: int,
    transposed: bool,
    measured: Sequence[tuple[int, torch.dtype | None]],
) -> None: ...
def cpu_library_reason(x_dtype: torch.dtype, rank: int) -> str:
    """Why a call takes the library route, or "" if the vector kernels compute it."""

class Card:
    """The resources of a GPU for kernels; sizes in bytes, arch is 10 major + minor."""

    arch: int
    sms: int
    shared_per_sm: int
    shared_per_block: int
    name: str
    error: str
    def __init__(
        self,
        arch: int,
        sms: int,
        shared_per_sm: int,
        shared_per_block: int,
        name: str = "",
        tensor_maps: bool = True,
        sm90a_code: bool = True,
        error: str = "",
    ) -> None: ...

class Problem:
    """One LoRA linear as the planner's input (csrc/kernels/plan/problem.h)."""

    rank: int
    dtype: torch.dtype
    float_adapters: bool
    dropout: bool
    aligned: bool
    aligned_weight: bool
    aligned_a: bool
    aligned_b: bool
    def __init__(self, m: int, n: int, k: int, rank: int) -> None: ...

class Plan:
    """Kernels, tile, splits, workspace in bytes, and the reason; str() lists the launches."""

    kernel: bool
    hybrid: bool
    reason: str
    workspace: int
    columns: int
    panels: int
    one_pass: bool
    tile: str
    predicted_us: dict[str, float]
    wgmma: bool
    wgrad_uses_pdl: bool
    blocks: int
    shrink_splits: int
    dlora_a_splits: int
    dlora_b_splits: int

def plan_forward(card: Card, problem: Problem, choice: str = "auto") -> Plan: ...
def plan_backward(card: Card, problem: Problem, choice: str = "auto") -> Plan: ...
def tiles_of(card: Card, *, backward: bool, float_adapters: bool, dropout: bool) -> list[str]: ...

class Kernels:
    """The kernels that one call uses: the unit that is checked (csrc/op/check/kernel_check.h)."""

    name: str
    backward: bool
    dtype: torch.dtype

def runs_kernels(device: torch.device) -> bool: ...
def all_grouped_kernels(card: Card) -> list[Kernels]: ...
def all_kernels(card: Card, use_pdl: bool) -> list[Kernels]: ...
def kernels_of(plan: Plan, problem: Problem, *, backward: bool) -> Kernels: ...
def plan_as_asked(
    card: Card,
    problem: Problem,
    *,
    backward: bool,
    choice: str,
    tile: str = "",
    use_pdl: bool = True,
    groups: int = 0,
    listed: bool = False,
    own_weights: bool = False,
) -> Plan:
    """The plan for a route and a tile, or the planner's own if the tile is not available; with
    groups, for this number of adapters, in a list or a pool, and an index, or of experts with
    weights of their own."""

class AutotuneEntry:
    """The fastest route for a layer and rows on a card (kernels/plan/autotune_cache.h)."""

    def __init__(
        self,
        *,
        backward: bool,
        float_adapters: bool,
        dropout: bool,
        rows: int,
        out_features: int,
        in_features: int,
        rank: int,
        route: str,
        tile: str,
        measured: str,
    ) -> None: ...

def replace_autotune_cache(card: str, entries: list[AutotuneEntry]) -> None: ...

# Without CUDA kernels in the build (with_cuda) the rest finds no card and runs nothing.
class Explained:
    """A plan, and the result of the check of its kernels."""

    plan: Plan
    check: str

def cuda_card(device: torch.device) -> Card: ...
def cuda_driver() -> str: ...
def explain_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    dropout_p: float,
) -> Explained: ...
def explain_backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    dropout_p: float,
    grad: torch.Tensor | None = None,
) -> Explained: ...
def explain_problem(device: torch.device, problem: Problem) -> Explained: ...

# A result is "passed", "not yet" or what failed; the device has an index.
def check_kernels(device: torch.device, kernels: Kernels) -> str: ...
def check_result(device: torch.device, kernels: Kernels) -> str: ...
def check_results(device: torch.device) -> list[tuple[str, str]]: ...
def remember_check(device: torch.device, kernels: Kernels, result: str) -> None: ...
def set_check_timeout(seconds: float) -> None: ...
def check_timeout() -> float: ...
def use_pdl() -> bool: ...
def set_cuda_route(name: str) -> None: ...
def set_pdl(enabled: bool) -> None: ...
def set_reserved_sms(count: int) -> None: ...
def cuda_route() -> str: ...
