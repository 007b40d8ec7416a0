"""Finds, in the source of kernels, every fault site and everything that should carry one.

A kernel wraps each barrier, fence, wait, count and predicate in a fault site (fault.h). The
mutants that the tests run are exactly the sites found here, and `unguarded` finds what has none, so
a synchronisation that is added later cannot stay without a mutant.
"""

import re
from dataclasses import dataclass
from pathlib import Path

SPECIMENS = Path(__file__).parent / "specimens"
KERNELS = Path(__file__).resolve().parents[2] / "csrc" / "kernel"
SOURCES = {
    "reduction": ["reduction.h"],
    "gemm_mma_sync": ["gemm_mma_sync.h"],
    "gemm_wgmma": [
        "gemm_wgmma_block.h",
        "gemm_wgmma_producer.h",
        "gemm_wgmma_consumer.h",
        "gemm_wgmma.h",
    ],
    "lora_gemm_sm80": [
        "lora_gemm_sm80.h",
        "tile_copy_sm80.h",
        "lora_gemm_sm80_epilogue.h",
        "accumulator_mask.h",
        "bias.h",
    ],
    "lora_gemm_sm90a": [
        "lora_gemm_sm90a.h",
        "lora_gemm_sm90a_block.h",
        "lora_gemm_sm90a_producer.h",
        "lora_gemm_sm90a_consumer.h",
        "lora_gemm_sm90a_epilogue.h",
        "accumulator_mask.h",
        "bias.h",
    ],
    "lora_gemm_in_grid_sm90a": [
        "lora_gemm_sm90a_in_grid.h",
        "lora_gemm_sm90a_jobs.h",
    ],
    "lora_shrink_sm80": [
        "lora_shrink_sm80.h",
        "fragment_mask.h",
        "lora_reduce.h",
        "sum_of_splits.h",
        "tile_copy_sm80.h",
    ],
    "lora_wgrad_sm80": [
        "lora_wgrad_sm80.h",
        "fragment_mask.h",
        "lora_reduce_wgrad.h",
        "sum_of_splits.h",
        "tile_copy_sm80.h",
    ],
    "lora_dsdb_sm80": ["lora_dsdb_sm80.h", "tile_copy_sm80.h"],
    "lora_split": ["lora_split.h", "halves.h"],
}

# The mutants of a site, by the function that makes it one.
DIRECTIONS = {
    "skip": [""],
    "swap": [""],
    "value": [""],
    "count": [":low", ":high"],
    "flag": [":always", ":never"],
}

# What orders or completes something: leaving it out, or getting a count wrong, is a fault.
SYNCHRONISATION = {
    "__syncthreads",
    "__syncwarp",
    "__threadfence",
    "warpgroup_barrier",
    "ptx::bar_sync",
    "ptx::bar_arrive",
    "ptx::cluster_arrive",
    "ptx::cluster_arrive_relaxed",
    "ptx::cluster_wait",
    "ptx::cp_async_commit_group",
    "ptx::cp_async_wait_group",
    "ptx::mbarrier_init",
    "ptx::mbarrier_arrive",
    "ptx::mbarrier_arrive_remote",
    "ptx::mbarrier_arrive_cluster",
    "ptx::mbarrier_arrive_expect_tx",
    "ptx::mbarrier_expect_tx",
    "ptx::mbarrier_wait",
    "ptx::mbarrier_wait_cluster",
    "ptx::mbarrier_try_wait",
    "ptx::fence_mbarrier_init",
    "ptx::fence_proxy_async_shared",
    "ptx::fence_proxy_async_global",
    "ptx::fence_acq_rel_gpu",
    "ptx::fence_acq_rel_cluster",
    "ptx::bulk_commit_group",
    "ptx::bulk_wait_group",
    "ptx::bulk_wait_group_read",
    "ptx::wgmma_fence",
    "ptx::wgmma_commit_group",
    "ptx::wgmma_wait_group",
    "ptx::setmaxnreg_dec",
    "ptx::setmaxnreg_inc",
    "ptx::griddepcontrol_launch_dependents",
    "ptx::griddepcontrol_wait",
    "ptx::load_acquire_gpu",
    "ptx::store_release_gpu",
    "ptx::atomic_add_release_gpu",
}

# What only moves or computes data, or asks where it is.
DATA = {
    "ptx::atomic_add_relaxed_gpu",
    "ptx::cluster_rank",
    "ptx::cluster_size",
    "ptx::cp_async_16",
    "ptx::dynamic_shared_memory",
    "ptx::ldmatrix_x2_trans",
    "ptx::ldmatrix_x4",
    "ptx::ldmatrix_x4_trans",
    "ptx::load_shared_cluster",
    "ptx::map_shared",
    "ptx::matrix_descriptor",
    "ptx::mma_m16n8k16",
    "ptx::shared_address",
    "ptx::stmatrix_x4",
    "ptx::store_shared_cluster",
    "ptx::tma_load_2d",
    "ptx::tma_load_2d_multicast",
    "ptx::tma_store_2d",
    "ptx::wgmma_rs",
    "ptx::wgmma_ss",
}

# Hints: without them a kernel is as correct, only slower, so no test of correctness can miss them.
HINTS = {
    "ptx::prefetch_tensor_map",
}

# These mutants compute the same, only slower: the tests demand that they, and no others, pass.
SPEED_ONLY = {
    "mask.in_step:never",  # a draw for each element, where one in eight would do
    "producer.first_tile:always",  # waits again for a kernel that has ended
    # The next grid begins when this one has ended, or could begin before: it waits where it must.
    "in_grid.lets_wgrad_begin:always",
    "in_grid.lets_wgrad_begin:never",
    "prepare.lets_gemm_begin",
    "producer.lets_wgrad_begin:always",
    "producer.lets_wgrad_begin:never",
    "reduce.lets_gemm_begin",
    "setup.main_product:never",  # two tensor maps less are prefetched
    "shrink.draw:always",  # again for the other half of the columns that a draw decides
    "shrink.mask_in_step:never",  # as mask.in_step
    "wgrad.mask_in_step:never",  # as mask.in_step
    "wgrad.poller:always",
    "wgrad.waits_for_dx:always",  # blocks stay where others could run
    "wgrad.no_tile:never",  # blocks beyond the narrower of two products multiply zeros
    "store.whole_chunk:never",  # eight stores of 2 bytes, where one of 16 would do
}

SITE = re.compile(r'Fault::(skip|swap|value|count|flag)\(\s*"([^"]+)"')
CALL = re.compile(r"\b((?:ptx::)?[a-z_][a-z0-9_]*)\s*(?:<[^<>;()]*(?:::[^<>;()]*)*>)?\(")
CONSTANT_BOUND = re.compile(r"[\w\s]+[<>]=?\s*(?:\d+|k[A-Z]\w*|\w+::k[A-Z]\w*|[\s*/+()-])+")


@dataclass(frozen=True)
class Mutant:
    specimen: str
    name: str


def strip_comments(text: str) -> str:
    """Blanks out comments and preprocessor lines, keeping every line where it is."""
    text = re.sub(r"//[^\n]*", "", text)
    return re.sub(r"^#[^\n]*", "", text, flags=re.MULTILINE)


def of_package(specimen: str) -> bool:
    """Whether it is a kernel of the package rather than one that lives with the tests."""
    return specimen.startswith("lora_")


def sources(specimen: str) -> dict[str, str]:
    folder = KERNELS if of_package(specimen) else SPECIMENS
    return {name: strip_comments((folder / name).read_text()) for name in SOURCES[specimen]}


def mutants(specimen: str) -> list[Mutant]:
    """Every mutant of a specimen, in the order of its source; a name must not occur twice."""
    found = []
    for name, text in sources(specimen).items():
        for match in SITE.finditer(text):
            for direction in DIRECTIONS[match[1]]:
                mutant = Mutant(specimen, match[2] + direction)
                if mutant in found:
                    raise ValueError(f"{name}: the fault site {match[2]} occurs twice")
                found.append(mutant)
    return found


def matching(text: str, opening: int) -> int:
    """The position of the bracket that closes the one at `opening`."""
    pairs = {"(": ")", "{": "}"}
    depth = 0
    for position in range(opening, len(text)):
        if text[position] == text[opening]:
            depth += 1
        elif text[position] == pairs[text[opening]]:
            depth -= 1
            if depth == 0:
                return position
    raise ValueError("unbalanced brackets")


def statement_start(text: str, position: int) -> int:
    """Where the statement around `position` begins: after a brace or a semicolon outside ()."""
    depth = 0
    for at in range(position - 1, -1, -1):
        if text[at] == ")":
            depth += 1
        elif text[at] == "(":
            depth -= 1
        elif text[at] in ";{}" and depth <= 0:
            return at + 1
    return 0


def chain_headers(text: str, start: int) -> str:
    """The header that starts at `start` and, if it is an else, those of the branches before it."""
    header = text[start:]
    if not header.lstrip().startswith("else"):
        return ""
    closing = text.rindex("}", 0, start)
    depth = 0
    for at in range(closing, -1, -1):
        depth += (text[at] == "}") - (text[at] == "{")
        if depth == 0:
            before = statement_start(text, at)
            return text[before:at] + chain_headers(text, before)
    raise ValueError("else without if")


def controlling_text(text: str, position: int) -> str:
    """The statement around `position` and the condition of the block that it stands in."""
    start = statement_start(text, position)
    end = position
    depth = 0
    while text[end] not in ";{" or depth > 0:
        depth += (text[end] == "(") - (text[end] == ")")
        end += 1
    context = text[start:end] + chain_headers(text, start)
    if start > 0 and text[start - 1] == "{":
        header = statement_start(text, start - 1)
        context += text[header : start - 1] + chain_headers(text, header)
    return context


def guarded_names(text: str) -> set[str]:
    """Boolean variables whose value comes from a fault site."""
    return set(re.findall(r"\bbool (\w+) =\s*Fault::", text))


def unguarded(specimen: str) -> list[str]:
    """Synchronisation and predicates without a fault site, and ptx functions in no list above."""
    problems = []
    for name, text in sources(specimen).items():
        names = guarded_names(text)

        def report(position: int, what: str, name: str = name, text: str = text) -> None:
            line = text.count("\n", 0, position) + 1
            problems.append(f"{name}:{line}: {what}")

        def carries_site(condition: str, names: set[str] = names) -> bool:
            return "Fault::" in condition or condition.strip(" !()\n") in names

        for match in CALL.finditer(text):
            called = match[1]
            defined = text[: match.start()].rstrip().endswith(("void", "int"))
            if called in SYNCHRONISATION and not defined:
                if "Fault::" not in controlling_text(text, match.start()):
                    report(match.start(), f"{called} carries no fault site")
            elif called.startswith("ptx::") and called not in SYNCHRONISATION | DATA | HINTS:
                report(match.start(), f"{called} is not classified in mutants.py")

        for match in re.finditer(r"\b(if|while) \(", text):
            closing = matching(text, match.end() - 1)
            if not carries_site(text[match.end() : closing]):
                report(match.start(), f"the condition of this {match[1]} carries no fault site")
        for match in re.finditer(r"\bfor \(", text):
            parts = text[match.end() : matching(text, match.end() - 1)].split(";")
            bound = parts[1].strip() if len(parts) == 3 else ""
            if bound and not carries_site(bound) and not CONSTANT_BOUND.fullmatch(bound):
                report(match.start(), "the bound of this for carries no fault site")
        for match in re.finditer(r"\?", text):
            statement = text[statement_start(text, match.start()) : match.start()]
            condition = statement.rsplit("=", 1)[-1] if "Fault::" not in statement else statement
            constant = "constexpr" in statement
            if (
                not constant
                and not carries_site(condition)
                and not any(re.search(rf"\b{guard}$", condition.strip()) for guard in names)
            ):
                report(match.start(), "the condition of this ?: carries no fault site")
    return problems
