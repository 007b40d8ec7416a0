"""The inline asm of csrc/ptx/ against CUTLASS', and against the PTX ISA where CUTLASS has none.

Both are compiled to PTX and compared by where each operand comes from (asm_provenance.py). The
oracle is itself tested: every modifier dropped, every pair of operands swapped and every clobber
removed is seen.
"""

import itertools
import re
import shutil
from pathlib import Path

import pytest

from emulator.oracles import oracle_tools
from emulator.oracles.asm_provenance import Event, analyse, kernel_bodies, read_ptx

pytestmark = pytest.mark.kernels

# Where CUTLASS writes something else than csrc/ptx/: its text, ours, and why ours is right.
ACCEPTED_DIFFERENCES = [
    (r"\.(x[124])((?:\.trans)?)\.m8n8\.", r".m8n8.\1\2.", "PTX ISA 7.8 puts the shape first"),
    (r"\.L2::128B", "", "a prefetch hint"),
    (r"^(barrier\.cluster\..*)\.aligned$", r"\1", "lanes of a warp may come at different times"),
]


def without_cache_hint(event: Event) -> Event:
    """A TMA load of CUTLASS carries a cache policy; EVICT_NORMAL is what it is without one."""
    if ".L2::cache_hint" not in event.what:
        return event
    assert event.operands[-1] == str(0x1000000000000000), "expected EVICT_NORMAL"
    return Event(event.what.replace(".L2::cache_hint", ""), event.operands[:-1])


def accepted(events: list[Event]) -> list[Event]:
    """CUTLASS' events with the accepted differences applied."""
    result = []
    for event in map(without_cache_hint, events):
        what = event.what
        for theirs, ours, _ in ACCEPTED_DIFFERENCES:
            what = re.sub(theirs, ours, what)
        result.append(Event(what, event.operands))
    return result


def store(value: str) -> Event:
    return Event("store", ("param0", value))


# Functions without a counterpart in CUTLASS 4.2: what the PTX ISA asks for.
EXPECTED = {
    "mul_wide": [
        Event("mul.wide.u32", ("param1", "param2")),
        store("mov.b64(asm0.0).0"),
        Event("store", ("param0+4", "mov.b64(asm0.0).1")),
    ],
    "dynamic_shared_memory": [store("_ZN8lora_ext3ptx22lora_ext_shared_memoryE")],
    # CUTLASS' elect_one_sync gives the lane's number, too, by another way from predicate to result.
    "elect_sync": [Event("elect.sync", ("0xffffffff",)), store("(asm0.1?1:0)")],
    "mbarrier_wait": [
        Event("mbarrier.try_wait.parity.shared::cta.b64", ("[param0]", "param1")),
        Event("branch back", ("not(asm0.0)",)),
    ],
    "fence_proxy_async_global": [Event("fence.proxy.async.global")],
    "fence_acq_rel_gpu": [Event("fence.acq_rel.gpu")],
    "bulk_wait_group": [Event("cp.async.bulk.wait_group", ("3",))],
    "atomic_add_relaxed_gpu": [
        Event("atom.relaxed.gpu.global.add.u32", ("[param1]", "param2")),
        store("asm0.0"),
    ],
}

# Instructions that touch no memory: their asm needs no "memory" clobber. wgmma reads shared memory
# through the async proxy, which wgmma_fence and fence_proxy_async_shared order.
WITHOUT_MEMORY = re.compile(r"mov\.|mul\.|mapa|elect|mma\.sync|wgmma\.mma_async|setmaxnreg")


@pytest.fixture(scope="module")
def our_ptx(tmp_path_factory: pytest.TempPathFactory) -> str:
    return oracle_tools.compile_to_ptx(tmp_path_factory.mktemp("ours") / "ours.ptx")


@pytest.fixture(scope="module")
def ours(our_ptx: str) -> dict[str, list[Event]]:
    return read_ptx(our_ptx)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Event]]:
    include = oracle_tools.cutlass_include()
    target = tmp_path_factory.mktemp("theirs") / "theirs.ptx"
    ptx = oracle_tools.compile_to_ptx(target, "-DJUDGE_CUTLASS", f"-I{include}")
    return {name: accepted(events) for name, events in read_ptx(ptx).items()}


def judged(kernels: dict[str, list[Event]]) -> list[str]:
    """The kernels of functions, without those that probe clobbers."""
    return [name for name in kernels if not name.startswith("clobber_")]


def function_of(kernel: str, functions: set[str]) -> str:
    """mma_m16n8k16_bf16 -> mma_m16n8k16: the longest name of a function that it begins with."""
    return max((name for name in functions if f"{kernel}_".startswith(f"{name}_")), key=len)


def test_every_function_has_a_kernel(ours):
    functions = oracle_tools.functions_of_headers()
    assert {function_of(kernel, functions) for kernel in judged(ours)} == functions


def test_asm_equals_that_of_cutlass(ours, theirs):
    assert len(theirs) > 50
    differing = {
        name: (list(map(str, ours[name])), list(map(str, theirs[name])))
        for name in theirs
        if ours[name] != theirs[name]
    }
    assert not differing


def test_asm_without_counterpart_is_what_the_isa_asks_for(ours, theirs):
    without = [name for name in judged(ours) if name not in theirs]
    assert {name: ours[name] for name in without} == EXPECTED


def test_table_of_counterparts(ours, theirs, capsys):
    """Prints which functions CUTLASS judges and which the ISA's text alone."""
    functions = oracle_tools.functions_of_headers()
    rows: dict[str, list[str]] = {}
    for kernel in judged(ours):
        judge = "CUTLASS" if kernel in theirs else "ISA text"
        rows.setdefault(f"{function_of(kernel, functions):34}{judge}", []).append(kernel)
    with capsys.disabled():
        print(
            "\n" + "\n".join(f"{row:44}{len(kernels):4} kernels" for row, kernels in rows.items())
        )
    assert len(rows) == len(functions)


# ---- the oracle itself ----


def asm_statements(body: str) -> list[tuple[int, int]]:
    """Where the instructions of inline asm are in a kernel's text, without moves and predicates."""
    places = []
    for block in re.finditer(r"// begin inline asm(.*?)// end inline asm", body, re.DOTALL):
        for statement in re.finditer(r"[a-z][^;{}]*(?:\{[^}]*\}[^;{}]*)*(?=;)", block[1]):
            if not re.match(r"reg\b|setp|selp", statement[0]):
                places.append(
                    (block.start(1) + statement.start(), block.start(1) + statement.end())
                )
    return places


def mutants(statement: str) -> set[str]:
    """The statement with each modifier dropped and with each two of its operands swapped."""
    opcode, _, operands = statement.partition(" ")
    result = set()
    for modifier in re.finditer(r"\.\w+(?:::\w+)*", opcode):
        result.add(f"{opcode[: modifier.start()]}{opcode[modifier.end() :]} {operands}")
    tokens = list(re.finditer(r"%?\w+", operands))
    for one, other in itertools.combinations(tokens, 2):
        swapped = operands[: one.start()] + other[0] + operands[one.end() : other.start()]
        result.add(f"{opcode} {swapped}{one[0]}{operands[other.end() :]}")
    return result - {statement}


def sample(kernel: str) -> bool:
    """All functions, but of wgmma's only two: with 128 accumulators one has 8,000 pairs."""
    return not kernel.startswith("wgmma_ss_") or kernel.endswith("_64_kK_kMN")


def test_every_wrong_modifier_and_swap_is_seen(our_ptx, ours):
    seen = 0
    for kernel, body in kernel_bodies(our_ptx).items():
        if kernel.startswith("clobber_") or not sample(kernel):
            continue
        for start, end in asm_statements(body):
            for wrong in mutants(body[start:end]):
                try:
                    events = analyse(body[:start] + wrong + body[end:])
                except (ValueError, IndexError):  # no longer an instruction that the reader knows
                    events = []
                assert events != ours[kernel], f"{kernel}: {body[start:end]!r} -> {wrong!r} passed"
                seen += 1
    assert seen > 1800


# Edits of the headers that the compiler accepts: header, right text, wrong text, a kernel that must
# differ then.
WRONG_HEADERS = [
    ("sync.h", 'sync %0, %1;" ::"r"(id)', 'sync %1, %0;" ::"r"(id)', "bar_sync"),
    ("memory.h", '"n"(kPending)', '"n"(kPending + 1)', "cp_async_wait_group"),
    ("mma.h", '"r"(b[0]), "r"(b[1])', '"r"(b[1]), "r"(b[0])', "mma_m16n8k16_f16"),
    ("mma.h", '(r[0]), "=r"(r[1])', '(r[1]), "=r"(r[0])', "ldmatrix_x2_trans"),
    ("wgmma_operands.h", '"%0, %1, ', '"%1, %0, ', "wgmma_ss_bf16_256_kK_kK"),
    ("wgmma_operands.h", '"+f"(d[i + 1])', '"=f"(d[i + 1])', "wgmma_ss_f16_64_kK_kMN"),
    ("wgmma.h", '"n"(kTransposeA),', '"n"(kTransposeB),', "wgmma_ss_f16_192_kK_kMN"),
    ("tma.h", '"r"(x), "r"(y)', '"r"(y), "r"(x)', "tma_load_2d"),
]


def test_wrong_headers_are_seen(ours, tmp_path):
    csrc = tmp_path / "csrc"
    shutil.copytree(oracle_tools.CSRC / "ptx", csrc / "ptx")
    for header, right, wrong, _ in WRONG_HEADERS:
        path = csrc / "ptx" / header
        text = path.read_text()
        assert right in text, f"{header} no longer has {right!r}"
        path.write_text(text.replace(right, wrong))
    changed = read_ptx(oracle_tools.compile_to_ptx(tmp_path / "wrong.ptx", csrc=csrc))
    passed = [kernel for *_, kernel in WRONG_HEADERS if changed[kernel] == ours[kernel]]
    assert not passed


# ---- clobbers ----


def statements_of(header: str) -> list[str]:
    """The asm statements of a header, each with its constraints."""
    return re.findall(r"asm(?: volatile)?\((.*?)\);", re.sub(r"\\\n", "", header), re.DOTALL)


def without_clobber(header: str) -> list[str]:
    """The statements that touch memory and do not say so."""
    return [
        statement
        for statement in statements_of(header)
        if not WITHOUT_MEMORY.search(statement) and '"memory"' not in statement
    ]


HEADERS = sorted((oracle_tools.CSRC / "ptx").glob("*.h"))


@pytest.mark.parametrize("path", HEADERS, ids=lambda path: path.stem)
def test_clobbers(path: Path):
    header = re.sub(r"//.*", "", path.read_text())
    assert len(statements_of(header)) == len(re.findall(r"\basm\b", header))
    assert not without_clobber(header)
    for clobber in re.finditer(r':\s*"memory"', header):  # each of them removed is missed
        assert without_clobber(header[: clobber.start()] + header[clobber.end() :])


def test_compiler_keeps_memory_in_order(ours):
    """Around each function, the store before it stays before, and the load after it stays after."""
    probes = [name for name in ours if name.startswith("clobber_")]
    assert len(probes) > 30
    for name in probes:
        events = ours[name]
        count = sum(not re.match("store|branch", event.what) for event in events)
        assert events[0] == store("1"), name
        assert events[-1] == Event("store", ("param1", f"[param0]@{count}")), name
