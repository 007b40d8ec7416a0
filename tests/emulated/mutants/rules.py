"""Rules by which every synchronisation, condition and bound of a kernel becomes a mutant.

    in the source                         mutants                with the mutant planted
    statement of a synchronisation        :skip                  it is left out
    ..._wait_group<N>, setmaxnreg<N>      :more                  N + 1 groups, 8 registers more
    a condition, a boolean expression     :always, :never        true, false
    a < b, outside of unrolled loops      :low, :high            b - 1, b + 1
    mbarrier_init(address, count)         .count:low, :high      one arrival less, one more
    ..._expect_tx(address, bytes)         .bytes:low, :high      128 bytes less, 128 more
    mbarrier_wait(address, parity)        .parity:other          the other parity
    bar_sync(id, threads), bar_arrive     .threads:low, :high    a warp less, a warp more

Of functions that run on the device. A mutant is named for its file, function and text, and a second
one of the same name is "#2".
"""

import re

from tree_sitter import Node

from emulated.mutants.source import Source, descendants, is_constant, name_of_function
from emulated.mutants.wrap import Wrap, number, planted

# What orders or completes something: leaving it out, or getting a count wrong, is a fault.
SYNCHRONISATION = {
    "__syncthreads",
    "__syncwarp",
    "warpgroup_barrier",
    "ptx::bar_sync",
    "ptx::bar_arrive",
    "ptx::cluster_arrive",
    "ptx::cluster_arrive_relaxed",
    "ptx::cluster_wait",
    "ptx::cp_async_commit_group",
    "ptx::cp_async_wait_group",
    "ptx::mbarrier_init",
    "ptx::mbarrier_arrive_remote",
    "ptx::mbarrier_arrive_expect_tx",
    "ptx::mbarrier_wait",
    "ptx::fence_mbarrier_init",
    "ptx::fence_proxy_async_shared",
    "ptx::fence_proxy_async_global",
    "ptx::fence_acq_rel_gpu",
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
}

# What only moves or computes data, or asks where it is; and hints, without which a kernel is as
# correct, only slower.
OTHER = {
    "ptx::atomic_add_relaxed_gpu",
    "ptx::cluster_rank",
    "ptx::cp_async_16",
    "ptx::dynamic_shared_memory",
    "ptx::elect_sync",
    "ptx::ldmatrix_x2_trans",
    "ptx::ldmatrix_x4",
    "ptx::ldmatrix_x4_trans",
    "ptx::map_shared",
    "ptx::matrix_descriptor",
    "ptx::mma_m16n8k16",
    "ptx::mul_wide",
    "ptx::prefetch_tensor_map",
    "ptx::shared_address",
    "ptx::stmatrix_x4",
    "ptx::tma_load_2d",
    "ptx::tma_load_2d_multicast",
    "ptx::tma_store_2d",
    "ptx::wgmma_pin",
    "ptx::wgmma_ss",
}

COMPARISONS = {"<", "<=", ">", ">="}
BOOLEAN = {*COMPARISONS, "==", "!=", "&&", "||"}
# The second argument of a synchronisation: its name, and what is added to it.
COUNTS = {
    "ptx::mbarrier_init": ("count", 1),
    "ptx::mbarrier_arrive_expect_tx": ("bytes", 128),
    "ptx::bar_sync": ("threads", 32),
    "ptx::bar_arrive": ("threads", 32),
}
PARITIES = {"ptx::mbarrier_wait"}
MORE = {"_wait_group": 1, "_wait_group_read": 1, "setmaxnreg_dec": 8, "setmaxnreg_inc": 8}


def name_of_call(call: Node) -> tuple[str, Node | None]:
    """What is called, "ptx::f" or the last name of a path, and its template arguments."""
    function = call.child_by_field_name("function")
    arguments = None
    for node in descendants(function):
        if node.type == "template_argument_list":
            arguments = node
            break
    text = function.text.decode()
    text = text if arguments is None else text[: arguments.start_byte - function.start_byte]
    return (text if text.startswith("ptx::") else re.split(r"\.|->|::", text)[-1]), arguments


class Rules:
    """The wraps of one source, in the order of its text."""

    def __init__(self, source: Source):
        self.source = source
        self.wraps: list[Wrap] = []
        self.names: set[tuple[str, str]] = set()
        for function in source.device_functions():
            self.function = name_of_function(function)
            for node in descendants(function.child_by_field_name("body")):
                self.visit(node)

    def visit(self, node: Node) -> None:
        if node.type == "call_expression":
            self.call(node)
        if node.type == "for_statement":
            self.loop(node)
        elif self.is_whole_condition(node) and not is_constant(node):
            self.condition(node)

    def site(self, kind: str, what: str) -> str:
        """The name of a place with mutants of this kind."""
        first = name = f"{self.source.stem}.{self.function}.{''.join(what.split())}"
        count = 1
        while (kind, name) in self.names:
            count += 1
            name = f"{first}#{count}"
        self.names.add((kind, name))
        return name

    def wrap(self, node: Node, before: str, after: str, *mutants: str) -> None:
        self.wraps.append(Wrap(node.start_byte, node.end_byte, before, after, mutants))

    def call(self, call: Node) -> None:
        name, template_arguments = name_of_call(call)
        if name not in SYNCHRONISATION:
            if name.startswith("ptx::") and name not in OTHER:
                raise ValueError(
                    f"{self.source.path}: expected {name} in SYNCHRONISATION or OTHER of rules.py"
                )
            return
        statement = call.parent
        if statement.type != "expression_statement":
            raise ValueError(f"{self.source.path}: expected {name} to be a statement")
        site = self.site("call", name.removeprefix("ptx::"))
        skip, more = f"{site}:skip", f"{site}:more"
        step = next((count for ending, count in MORE.items() if name.endswith(ending)), None)
        if step is None:
            self.wrap(statement, f"{{ if (!{planted(skip)}) ", " }", skip)
        else:
            wrong = f"{name}<({self.source.of(template_arguments)[1:-1]}) + {step}>();"
            before = f"{{ if ({planted(more)}) {wrong} else if (!{planted(skip)}) "
            self.wrap(statement, before, " }", more, skip)
        arguments = call.child_by_field_name("arguments").named_children
        if name in COUNTS:
            what, step = COUNTS[name]
            self.off_by(arguments[1], f"{site}.{what}", step)
        elif name in PARITIES:
            other = f"{site}.parity:other"
            self.wrap(arguments[1], "((", f") ^ ({planted(other)} ? 1u : 0u))", other)

    def off_by(self, node: Node, site: str, step: int = 1) -> None:
        low, high = f"{site}:low", f"{site}:high"
        after = f") + {step} * emulator::off_by({number(low)}, {number(high)}))"
        self.wrap(node, "((", after, low, high)

    def loop(self, loop: Node) -> None:
        condition = loop.child_by_field_name("condition")
        before = loop.prev_sibling
        if condition is None or (before is not None and b"unroll" in before.text[:20]):
            return  # its counter names registers
        self.limits(condition)

    def limits(self, expression: Node) -> None:
        for node in descendants(expression):
            if node.type != "binary_expression" or is_constant(node):
                continue
            right = node.child_by_field_name("right")
            operator = node.child_by_field_name("operator").text.decode()
            if operator in COMPARISONS and right.type != "number_literal":
                self.off_by(right, self.site("limit", self.source.of(node)))

    def condition(self, node: Node) -> None:
        site = self.site("condition", self.source.of(node))
        always, never = f"{site}:always", f"{site}:never"
        self.wrap(
            node, f"emulator::condition({number(always)}, {number(never)}, (", "))", always, never
        )
        if node.type == "binary_expression":
            self.limits(node)

    def is_whole_condition(self, node: Node) -> bool:
        """A condition, or the outermost of a boolean expression."""
        if not node.is_named or node.type in {"condition_clause", "parenthesized_expression"}:
            return False
        child, parent = node, node.parent
        while parent.type in {"condition_clause", "parenthesized_expression"}:
            child, parent = parent, parent.parent
        if parent.type == "for_statement":
            return False
        if (
            parent.type
            in {"if_statement", "while_statement", "do_statement", "conditional_expression"}
            and parent.child_by_field_name("condition") == child
        ):
            return True
        if not is_boolean(node):
            return False
        return not is_boolean(parent)


def is_boolean(node: Node) -> bool:
    operator = node.child_by_field_name("operator")
    if node.type == "binary_expression":
        return operator.text.decode() in BOOLEAN
    return node.type == "unary_expression" and operator.text == b"!"


def wraps_of(source: Source) -> list[Wrap]:
    return Rules(source).wraps
