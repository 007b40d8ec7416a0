"""A kernel as ptxas and nvdisasm describe it, and what of it is wrong."""

import re
import subprocess
from dataclasses import dataclass, field
from typing import NamedTuple

import sass_loops
import sass_paths

OPCODES = ("HMMA", "LDGSTS", "LDSM", "LDL", "STL", "BAR")
OPCODES_SM90A = ("HGMMA", "UTMALDG", "MULTICAST", "UTMASTG", "STSM", "USETMAXREG", "ACQBULK")

MULTIPLIES = r"lora_((grouped_)?(gemm(_own_weights)?|shrink|wgrad|dsdb)|decode)\b"  # on sm_80

# What is counted of a main loop, beside all of its instructions.
COUNTED = {
    "tensor": ("HMMA", "HGMMA"),
    "shared": ("LDSM", "LDS", "STS", "STSM"),
    "copies": ("LDGSTS", "UTMALDG"),
    "loads": ("LD", "LDG"),
    "stores": ("ST", "STG"),
    "integer": ("IMAD", "IADD3", "LEA", "LOP3", "SHF", "ISETP", "SEL", "PRMT", "VIADD", "MOV"),
    "barrier": ("BAR", "SYNCS", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "WARPSYNC"),
}

# Kernels, by the beginning of their names or a word in them, whose main loops are known to have a
# block wait for plain loads: round trips through memory at most on a way from a barrier to the
# next product, loops on it once, and what they bring. Others have none.
KNOWN_TO_WAIT = {
    r".* element$": (18, "operands at odd addresses, whose elements no asynchronous copy takes"),
    r"lora_grouped_(gemm|shrink|wgrad) ": (
        1,
        "floats of some chunks of a factor, all at once; an adapter and rows of the tile",
    ),
    r"lora_grouped_gemm_own_weights ": (2, "a tile's expert and rows; elements at odd addresses"),
    r"lora_decode ": (1, "a chunk of a factor that is float, or at odd addresses"),
}
# An A100's tensor core takes 8 cycles for 16 x 8 x 16, in which its SMSP issues 8 instructions.
MOST_INSTRUCTIONS_A_PRODUCT = 8

# A value that is dequantised to a half moves 2.5 or 3 bytes: at 10 or 12.5 instructions an H100
# would issue those of 3.0e12 or 2.4e12 values a second, twice what its DRAM moves, and other cards
# have less of it.
MOST_INSTRUCTIONS_A_VALUE = {"dequantize_4bit": 10, "dequantize_8bit": 12.5}
_STEP_BYTES = 16 * 64 * 2  # 16 rows of W, 64 along k

# Shared memory of an SM and of a block at most, in bytes, for compiled code's smallest card.
SHARED = {"sm_80": (167936, 166912), "sm_90a": (233472, 232448)}
SHARED_OF_CONSUMER_CARDS = (102400, 101376)  # compute capability 8.6 and 8.9, which run sm_80 code
REGISTERS_PER_SM, THREADS_PER_SM = 65536, 2048
RESERVED_PER_BLOCK = 1024  # of shared memory, from compute capability 8.0 on


class Launch(NamedTuple):
    """How an instance is launched, as csrc/kernels/ has it."""

    shared: int  # bytes of dynamic shared memory
    threads: int
    resident: int = 0  # blocks that the plan gives to an SM at most; 0: as many as fit


@dataclass(frozen=True)
class MultiplyingLoop:
    """What a loop with tensor core products holds beside them."""

    place: str  # addresses of its first and last instruction
    main: bool  # no loop within it multiplies
    membar: int
    wide_membar: int  # not of a block alone
    local: int  # LDL and STL
    divisions: int
    instructions: int = 0
    counted: dict[str, int] = field(default_factory=dict)  # of them, by COUNTED
    waited_loads: int = 0  # plain loads between a barrier and the first product behind it
    round_trips: int = 0  # in which they come, where each waits for a store of the one before


@dataclass
class Kernel:
    """One instance on one architecture."""

    name: str
    arch: str
    threads: int
    shared_bytes: int
    registers: int = 0
    stack_bytes: int = 0
    spill_bytes: int = 0
    opcodes: dict[str, int] = field(default_factory=dict)
    groups: list[int] = field(default_factory=list)  # wgmmas of each step that waits once
    loops: list[MultiplyingLoop] = field(default_factory=list)
    # Of a kernel that dequantises: what a lane writes of a tile, by how many instructions and
    # stores.
    values: int = 0
    tile: int = 0
    wide_stores: int = 0
    step: int = 0  # instructions of lora_decode's, in which a warp multiplies 2 KiB of W
    lane_loops: int = 0  # BRA.U.ANY: around a TMA copy whose operands might differ among lanes

    def blocks(self, shared_per_sm: int, shared_per_block: int) -> int:
        """Blocks that an SM holds at a time; 0 if one does not fit."""
        if self.shared_bytes > shared_per_block:
            return 0
        of_a_block = -(-self.registers * 32 // 256) * 256 * (self.threads // 32)
        by_shared = shared_per_sm // (self.shared_bytes + RESERVED_PER_BLOCK)
        return min(REGISTERS_PER_SM // of_a_block, by_shared, THREADS_PER_SM // self.threads)

    @property
    def is_sm90a(self) -> bool:
        return "sm90a" in self.name

    @property
    def of_experts(self) -> bool:
        return "own_weights" in self.name

    @property
    def is_decode(self) -> bool:
        return self.name.startswith("lora_decode")

    def objections_to_groups(self) -> list[str]:
        """A step's wgmmas follow each other: ptxas put no wait between them."""
        blocks = 2 if "pingpong" in self.name else 1  # of 64 rows
        tail = 1 if self.of_experts else int(self.name.rsplit(" ", 1)[1])
        whole = {4 * blocks, tail * blocks}
        if set(self.groups) == whole and sum(self.groups) == self.opcodes["HGMMA"]:
            return []
        return [f"groups of {self.groups} HGMMA, expected {sorted(whole)}"]

    def objections_to_loops(self) -> list[str]:
        """Memory barriers hold a warp up, those wider than a block until L2 has answered.

        Around the main loop, once a tile, fence.proxy.async is one for the block alone, and
        lora_decode counts parts of tiles.
        """
        found = []
        for loop in self.loops:
            barriers = loop.membar if loop.main else 0 if self.is_decode else loop.wide_membar
            if barriers:
                found.append(f"{barriers} MEMBAR in the loop at {loop.place}")
            if loop.local:
                found.append(f"{loop.local} LDL and STL in the loop at {loop.place}")
            if loop.round_trips > self.known_round_trips:
                loads = f"{loop.waited_loads} plain loads before products at {loop.place}"
                most = f"expected {self.known_round_trips} at most"
                found.append(f"{loads}: {loop.round_trips} round trips, {most}")
            products = loop.counted.get("tensor", 0)
            most = MOST_INSTRUCTIONS_A_PRODUCT * products
            if self.name.startswith("lora_gemm ") and loop.main and loop.instructions > most:
                each = f"{loop.instructions} instructions for {products} products"
                found.append(f"{each} at {loop.place}")
        multiplies = self.opcodes["HMMA"] or self.opcodes.get("HGMMA")
        return found if self.loops or not multiplies else ["no loop multiplies"]

    @property
    def divisions(self) -> int:
        """In its main loops."""
        return sum(loop.divisions for loop in self.loops if loop.main)

    @property
    def known_round_trips(self) -> int:
        known = (most for each, (most, _) in KNOWN_TO_WAIT.items() if re.match(each, self.name))
        return next(known, 0)

    @property
    def waited_loads(self) -> int:
        """In its main loops."""
        return sum(loop.waited_loads for loop in self.loops)

    @property
    def round_trips(self) -> int:
        """In its main loops."""
        return max((loop.round_trips for loop in self.loops), default=0)

    @property
    def instructions_a_value(self) -> float:
        return self.tile / self.values

    def objections_to_tile(self) -> list[str]:
        """A tile is stored by 16 bytes, and DRAM takes longer than its instructions do.

        float32 values are of 4 bytes, and may take as much more.
        """
        bytes_each = 16 * self.wide_stores // self.values
        found = [] if bytes_each in (2, 4) else [f"{self.wide_stores} stores of 16 bytes in a tile"]
        most = MOST_INSTRUCTIONS_A_VALUE[self.name.split()[0]] * max(1, bytes_each / 2)
        if self.instructions_a_value > most:
            found.append(f"{self.instructions_a_value:.1f} instructions a value")
        return found

    def objections_to_step(self) -> list[str]:
        """DRAM takes longer to bring a step's bytes than an SM to issue it."""
        if self.step == 0:
            return ["no loop copies and multiplies"]
        bytes_each = _STEP_BYTES / self.step
        enough = bytes_each >= sass_paths.LEAST_BYTES
        return [] if enough else [f"{self.step} instructions a step, {bytes_each:.1f} bytes each"]

    def objections(self) -> list[str]:
        """What is wrong, one line each."""
        found = []
        if self.stack_bytes or self.spill_bytes:
            found.append(f"{self.stack_bytes} bytes of stack, {self.spill_bytes} of spills")
        if self.opcodes["LDL"] or self.opcodes["STL"]:
            found.append(f"{self.opcodes['LDL']} LDL and {self.opcodes['STL']} STL")
        found += self.objections_to_loops()
        if self.values:
            found += self.objections_to_tile()
        if self.is_decode:
            found += self.objections_to_step()
        if self.is_sm90a:
            without = set()
            if self.of_experts:  # whose rows are gathered, and whose blocks are no clusters
                without = {"ACQBULK", "MULTICAST", "UTMASTG"}
            wanted = [name for name in OPCODES_SM90A if name not in without]
            wanted += ["LDGSTS"] * self.of_experts
            found += [f"no {name}" for name in wanted if not self.opcodes[name]]
            found += self.objections_to_groups()
            if self.lane_loops:  # some 70 cycles for each copy, where elect.sync says who issues it
                found.append(f"{self.lane_loops} BRA.U.ANY: loops over lanes")
        elif re.match(MULTIPLIES, self.name):
            wanted = ["HMMA", "LDSM"] + ([] if "element" in self.name else ["LDGSTS"])
            found += [f"no {name}" for name in wanted if not self.opcodes[name]]
        if self.blocks(*SHARED[self.arch]) == 0:
            found.append("no block fits on an SM")
        return [f"{self.name} on {self.arch}: {line}" for line in found]


def name_of(demangled: str) -> str:
    """A kernel and its template arguments in short."""
    call = demangled.removeprefix("void ").replace("lora_ext::kernel::", "").split(">(")[0]
    kernel, _, rest = call.partition("<")
    if kernel.endswith("sm90a"):
        return name_of_sm90a(kernel, rest)
    tile = re.search(r"LoraGemmTile<(\d+), (\d+), \d+, \d+, \d+, (\d+)", rest)
    rest = re.sub(r"LoraGemmTile<[^>]*>, ", "", rest)
    words = [kernel.removesuffix("_sm80")]
    deep = "x3" if tile and tile[3] == "16" else ""  # three stages, and a narrow slab
    words += [f"{tile[1]}x{tile[2]}{deep}"] if tile else []
    halves = {"__half": "fp16", "__nv_bfloat16": "bf16", "float": "float", "long": "int64"}
    words += ["e4m3"] if "Float8Params" in rest else []
    types = re.findall(r"\b(?:__half|__nv_bfloat16|float|long)\b", rest)
    words += [halves[types[0]]] if types else []
    words += ["float"] if "float" in types[1:] else []
    flags = re.findall(r"\b(true|false)\b", rest)
    meanings = {"lora_gemm": ["MN-major", "masked"], "lora_shrink": ["MN-major", "masked"]}
    meanings["lora_wgrad"] = ["masked"]
    meanings["lora_gemm_own_weights"] = ["MN-major", "U MN-major", "masked"]
    of_one = words[0].replace("grouped_", "")
    for flag, meaning in zip(flags, meanings.get(of_one, []), strict=False):
        words += [meaning] if flag == "true" else []
    words += [number[1] for number in [re.search(r", (16|32), ", rest)] if number]
    words += [number[1] for number in [re.search(r"(\d+)$", rest)] if number and "decode" in kernel]
    words += ["element"] if "Alignment)1" in rest else []
    return " ".join(words)


def name_of_sm90a(kernel: str, arguments: str) -> str:
    """Of "__half, LoraGemmSm90aTile<256, 4, (Sm90aSchedule)0>, true, false, 1, NoFault"."""
    pattern = r"(\w+), LoraGemmSm90aTile<(\d+), \d+, \(?\w+\)?(\d)>, (\w+), (\w+), (\d)"
    if "own_weights" in kernel:
        half, *flags = arguments.split(", ")
        words = [kernel, "128x256", "fp16" if half == "__half" else "bf16"]
        meanings = ("MN-major", "U MN-major", "masked")
        return " ".join(
            [*words, *(m for m, flag in zip(meanings, flags, strict=True) if flag == "true")]
        )
    half, columns, schedule, mn_major, masked, tail = re.match(pattern, arguments).groups()
    words = [kernel, f"128x{columns}"]
    words += ["pingpong"] if schedule == "1" else []
    words += ["fp16" if half == "__half" else "bf16"]
    words += ["MN-major"] if mn_major == "true" else []
    words += ["masked"] if masked == "true" else []
    return " ".join([*words, "tail", tail])


def launch_of(name: str, known: dict[str, Launch]) -> Launch:
    kernel, *words = name.replace("grouped_", "").replace("_own_weights", "").split()
    tiles = [f"{kernel}_{word}" for word in words if f"{kernel}_{word}" in known]
    return known[tiles[0]] if tiles else known.get(kernel, Launch(0, 256))


def demangled(names: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    return done.stdout.splitlines()


INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)([.\w]*)", re.MULTILINE
)


def wgmma_groups(instructions: list[tuple[str, str]]) -> list[int]:
    """How many HGMMA there are from each WARPGROUP.ARRIVE to the wait that follows."""
    steps = "".join(
        {"HGMMA": "h", "WARPGROUP": "a" if suffix.startswith(".ARRIVE") else "w"}.get(name, "")
        for name, suffix in instructions
    )
    return [len(group) for group in re.findall(r"a(h+)w", steps)]


def multiplying_loops(text: str) -> list[MultiplyingLoop]:
    """Those of a kernel's disassembly."""
    loops = sass_loops.loops_of(text)
    main = list(sass_loops.main_loops(loops))
    return [
        MultiplyingLoop(
            loop.place,
            loop in main,
            loop.count("MEMBAR"),
            sum(each.opcode == "MEMBAR" and ".CTA" not in each.suffix for each in loop.body),
            loop.count(*sass_loops.LOCAL),
            loop.divisions,
            len(loop.body),
            {name: loop.count(*opcodes) for name, opcodes in COUNTED.items()},
            *(sass_loops.waits(text, loop) if loop in main else (0, 0)),
        )
        for loop in loops
        if loop.multiplies
    ]


def values_of_a_lane(name: str) -> int:
    """Of a tile of a kernel that dequantises: four chunks of 16 bytes; 0 of others."""
    if not name.startswith("dequantize"):
        return 0
    return 4 * 16 // (4 if name.endswith("float") else 2)


def kernels_of(report: str, disassembly: str, arch: str, known: dict[str, Launch]) -> list[Kernel]:
    entries = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores,"
        r" (\d+) bytes spill loads.*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    bodies = dict(
        re.findall(
            r"^\.text\.(\w+):\n(.*?)(?=^\.section|^\t\.section|\Z)",
            disassembly,
            re.DOTALL | re.MULTILINE,
        )
    )
    names = map(name_of, demangled([entry[0] for entry in entries]))
    kernels = []
    for (mangled, stack, stores, loads, registers), name in zip(entries, names, strict=True):
        launch = launch_of(name, known)
        instructions = INSTRUCTION.findall(bodies[mangled])
        used = [opcode for opcode, _ in instructions]
        of_others = "128x128x3" in name or "own_weights 128x128" in name
        if arch == "sm_90a" and of_others and "HMMA" not in used:
            continue  # no plan takes it there, and it has no code (csrc/kernels/gemm/params.h)
        wanted = [*OPCODES, *(OPCODES_SM90A if "sm90a" in name else ())]
        counts = {opcode: used.count(opcode) for opcode in wanted}
        if "MULTICAST" in counts:
            counts["MULTICAST"] = sum("MULTICAST" in suffix for _, suffix in instructions)
        lane_loops = sum(each == ("BRA", ".U.ANY") for each in instructions)
        tile = sass_paths.tile_of(bodies[mangled]) if name.startswith("dequantize") else []
        kernel = Kernel(
            name,
            arch,
            launch.threads,
            launch.shared,
            int(registers),
            int(stack),
            int(stores) + int(loads),
            counts,
            wgmma_groups(instructions),
            multiplying_loops(bodies[mangled]),
            values=values_of_a_lane(name),
            tile=len(tile),
            wide_stores=sum(map(sass_paths.is_wide_store, tile)),
            step=len(sass_paths.step_of(bodies[mangled])) if name.startswith("lora_decode") else 0,
            lane_loops=lane_loops,
        )
        kernels.append(kernel)
    return kernels
