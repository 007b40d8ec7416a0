"""The library route: rows in blocks where adapters are wider than activations, and its launches."""

import op_calls
import pytest
import torch
from helpers import BF16, F32, F64, make_problem
from torch.profiler import profile

import lora_ext
from benchmarks import memory
from lora_ext import _C

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PRODUCTS = ("aten::linear", "aten::mm", "aten::addmm_")
PASSES = ("aten::mul_", "aten::add_", "aten::copy_", "aten::to")


@pytest.mark.parametrize(("on", "mib"), [(CPU, 2), (CUDA, 256)], ids=["cpu", "cuda"])
@pytest.mark.parametrize("columns", [1, 7, 1024, 4096, 14336, 1 << 20])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_a_block_is_as_large_as_its_bytes_allow(on, mib, columns, dtype):
    rows = _C.rows_of_block(columns, dtype, on)
    row = columns * dtype.itemsize
    assert rows == 16 or rows * row <= mib << 20 < (rows + 1) * row
    assert rows >= 16


def test_a_training_step_on_cuda_is_a_block_or_two():
    """Thousands of launches if blocks were of the CPU's size."""

    def blocks(rows, columns, on):
        return -(-rows // _C.rows_of_block(columns, F32, on))

    assert blocks(4096, 4096, CUDA) == blocks(8192, 4096, CUDA) == 1
    assert blocks(8192, 14336, CUDA) == 2
    assert blocks(8192, 14336, CPU) == 228


def held_by_the_library(x, w) -> int:
    """Bytes that torch's own x @ W^T holds beside its result.

    oneDNN sums into a float32 result where there is AVX-512 but no bfloat16: 10,485,888 bytes here.
    """
    result = x.shape[0] * w.shape[0] * x.itemsize
    return memory.peak_bytes(lambda: torch.nn.functional.linear(x, w)) - result


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_two_blocks_bound_what_a_pass_holds(library_route, dropout_p):
    """Beside its results and what the library's product holds, in five blocks: docs/numerics.md."""
    columns, rank = 512, 4
    rows = 5 * _C.rows_of_block(columns, F32, CPU)
    problem = make_problem(rows, columns, columns, rank, (BF16, F32), bias=False)
    seed = torch.tensor(1) if dropout_p else None
    tail = (0.5, dropout_p, seed, 0, 0, False, None)
    operands = problem.operands
    ops, small = op_calls, 64 * (rows + columns) * rank
    small += held_by_the_library(problem.x, problem.weight)
    y, s = ops.lora_linear_forward(*operands, None, *tail)
    kept = y.nbytes + s.nbytes
    peak = memory.peak_bytes(lambda: ops.lora_linear_forward(*operands, None, *tail))
    assert peak <= kept + (4 << 20) + small

    wanted = [True, True, True, False]
    arguments = (problem.grad, *operands, s, *tail, wanted)
    kept = sum(result.nbytes for result in ops.lora_linear_backward(*arguments)[:3])
    peak = memory.peak_bytes(lambda: ops.lora_linear_backward(*arguments))
    assert peak <= kept + (4 << 20) + small


def launched(call) -> int:
    """Products and passes that the op makes; not zero-fills, nor views and casts to the same."""
    with memory.silent_stderr(), profile() as recorded:
        call()
    events = recorded.events()
    (op,) = [event for event in events if event.name.startswith("lora_ext::")]
    made = [child for child in op.cpu_children if child.name in PRODUCTS + PASSES]
    return sum(child.name != "aten::to" or bool(child.cpu_children) for child in made)


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_planner_counts_the_launches_of_the_route(library_route, blocks):
    """Counted on the CPU, whose blocks are smaller."""
    columns = 2048
    rows = blocks * _C.rows_of_block(columns, F32, CPU) - 1
    problem = make_problem(rows, columns, 24, 4, (BF16, F32), bias=False)
    ops, operands, tail = op_calls, problem.operands, (0.5, 0.0, None, 0, 0, False, None)
    _, s = ops.lora_linear_forward(*operands, None, *tail)
    in_forward = launched(lambda: ops.lora_linear_forward(*operands, None, *tail))
    arguments = (problem.grad, *operands, s, *tail, [True, True, True, False])
    in_backward = launched(lambda: ops.lora_linear_backward(*arguments))

    # Rows that make as many blocks on CUDA; the launches of each are the same.
    card = lora_ext.kernels.CARDS["A100"]
    problem = _C.Problem(blocks * _C.rows_of_block(columns, F32, CUDA) - 1, 24, columns, 4)
    problem.float_adapters = True
    for backward, counted, expected in ((False, in_forward, 6), (True, in_backward, 9)):
        plan = (_C.plan_backward if backward else _C.plan_forward)(card, problem, "library")
        launches = _C.predicted_launches(plan)
        assert sum(launch.launches for launch in launches) == counted == 1 + expected * blocks


def test_without_gradients_s_keeps_its_dtype(library_route):
    """Nobody reads S then: the pass that widens it for backward is left out."""
    problem = make_problem(64, 96, 80, 16, (BF16, BF16))
    operands = (*problem.operands, problem.bias)
    tail = (0.5, 0.0, None, 0, 0, False, None)
    with torch.no_grad():
        inference = launched(lambda: op_calls.lora_linear(*operands, *tail))
    training = launched(lambda: op_calls.lora_linear_forward(*operands, *tail))
    assert (inference, training) == (3, 4)
