"""Bugs that other LoRA and kernel projects had, as tests of this one.

Docstrings name the peers' public reports.
"""

import faulthandler
import gc
import mmap
import multiprocessing
import resource
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import op_calls
import pytest
import torch
from helpers import (
    BF16,
    DTYPE_PAIRS,
    F16,
    F32,
    F64,
    assert_exact,
    leaf,
    make_problem,
    masked,
    pair_id,
    run_integers,
    run_ours,
)

import lora_ext

OP = op_calls.lora_linear
EXACT_PAIRS = [(F32, F32), (BF16, F32), (F16, F32)]


# ---- sizes ----


def spread(values, pitch, storage_offset=0):
    """A copy of values [rows, cols] with rows `pitch` elements apart, in memory that is not there.

    On the CPU the address range is reserved only: the pages of the rows are all that is allocated.
    """
    rows, cols = values.shape
    elements = pitch * (rows - 1) + cols + storage_offset
    if values.is_cuda:
        flat = torch.empty(elements, dtype=values.dtype, device=values.device)
    else:
        without_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | without_reserve
        try:
            memory = mmap.mmap(-1, elements * values.element_size(), flags=flags)
        except OSError as error:
            pytest.skip(f"no address range of {elements} elements: {error}")
        flat = torch.frombuffer(memory, dtype=values.dtype)
    return flat.as_strided((rows, cols), (pitch, 1), storage_offset).copy_(values)


def with_spread(problem, names, pitch, storage_offset=0):
    changed = {name: spread(getattr(problem, name), pitch, storage_offset) for name in names}
    return replace(problem, **changed)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("boundary", [2**31 - 1, 2**31, 2**31 + 1])
@pytest.mark.parametrize("name", ["x", "grad"])
def test_row_times_stride_beyond_int32(isa, device, dtype, boundary, name):
    """vllm#53028, vllm#53034: row * stride in 32 bits. Row 64 begins at the boundary, 65 beyond."""
    problem = make_problem(66, 64, 32, 4, (dtype, F32), device, scaling=0.5, integers=2)
    pitch, rest = divmod(boundary, 64)
    far = with_spread(problem, [name], pitch, rest)
    assert_exact(run_ours(far, 0.5), problem, *masked(problem, 0.5))


def in_a_child(check, *arguments):
    """Runs check(*arguments) in a fork of this process: a crash is a failure, and no more."""
    child = multiprocessing.get_context("fork").Process(target=check, args=arguments)
    child.start()
    child.join(60)
    if child.is_alive():
        child.kill()
        pytest.fail("the child hangs")
    assert child.exitcode == 0, f"the child ended with {child.exitcode}"


def check_far_rows(dtype, names):
    faulthandler.disable()  # pytest's: the exit code says enough
    problem = make_problem(64, 64, 32, 4, (dtype, F32), scaling=0.5, integers=2)
    far = with_spread(problem, names, 2**30 + 64)
    assert_exact(run_ours(far), problem)
    assert_exact(run_ours(far, 0.5), problem, *masked(problem, 0.5))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("names", [["x"], ["grad"], ["lora_a"], ["lora_b"]], ids="-".join)
def test_a_row_pitch_beyond_2_to_the_31_bytes(isa, dtype, names):
    """bitsandbytes#1784, #2067: overflow at 2^30 and 2^31; here the pitch itself is beyond."""
    spread(torch.zeros(64, 64, dtype=dtype), 2**30 + 64)  # skips where no such range is to be had
    in_a_child(check_far_rows, dtype, names)


@pytest.fixture
def nan_in_new_memory(deterministic):
    """torch fills what torch.empty returns with NaN, bytes with 255, which are NaN as floats."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()


# rows, in_features, out_features
TILES = [
    (1, 1, 1),
    (48, 16, 16),
    (48, 32, 64),
    (64, 64, 64),
    (49, 17, 65),
    (96, 128, 128),
    (63, 31, 1),
    (8, 32, 32),
    (9, 5, 70),
]


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=pair_id)
@pytest.mark.parametrize("rows_in_out", TILES, ids=lambda s: "x".join(map(str, s)))
def test_no_tile_reads_what_was_not_written(isa, device, nan_in_new_memory, pair, rows_in_out):
    """vllm#48590: NaN from expand where there is one tile. New memory is NaN, results are not."""
    for rank in (1, 8, 15, 16, 17, 32, 33, 129):
        problem = make_problem(*rows_in_out, rank, pair, device)
        for dropout_p in (0.0, 0.5):
            for name, value in run_ours(problem, dropout_p).items():
                assert value.isfinite().all(), (rank, dropout_p, name)


def test_a_call_remembers_nothing_of_the_call_before(isa, device):
    """vllm#51121: state prepared for a full batch used on a part of it."""
    problem = make_problem(200, 65, 97, 9, device=device, scaling=0.5, integers=3)
    packed = lora_ext.pack_weight(problem.weight, backward=True)
    for weight in (problem.weight, packed):
        run_ours(problem, 0.5, weight=weight)
        for rows in (199, 61, 48, 47, 8, 7, 1, 0, 200):
            part = replace(problem, x=problem.x[:rows], grad=problem.grad[:rows])
            run_integers(part, 0.5, weight=weight)


# ---- layouts ----


@pytest.mark.parametrize("pair", EXACT_PAIRS, ids=pair_id)
@pytest.mark.parametrize("name", ["x", "weight", "lora_a", "lora_b", "grad"])
@pytest.mark.parametrize("stride", [0, 1, 12345])
def test_any_stride_of_a_dimension_of_one(isa, device, pair, name, stride):
    """pytorch#195066: a product on the CPU was wrong where a dimension of 1 has stride 0."""
    for sizes in [(1, 33, 31, 4), (60, 1, 31, 4), (60, 33, 1, 4), (60, 33, 31, 1), (1, 1, 1, 1)]:
        problem = make_problem(*sizes, pair, device, scaling=0.5, integers=3)
        tensor = getattr(problem, name)
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        strides = [stride if size == 1 else step for size, step in steps]
        run_integers(replace(problem, **{name: tensor.as_strided(tensor.shape, strides)}), 0.5)


# ---- dtypes ----


DTYPES = [F64, F32, BF16, F16]


@pytest.mark.parametrize("cast", [None, BF16, F16], ids=str)
@pytest.mark.parametrize("adapters", DTYPES, ids=str)
@pytest.mark.parametrize("weight", DTYPES, ids=str)
@pytest.mark.parametrize("x", DTYPES, ids=str)
def test_every_mixture_of_dtypes_runs_or_is_refused(device, cast, adapters, weight, x):
    """unsloth#320, unsloth#7020: mixed float32 and bfloat16 crashed in the middle of a step."""
    problem = make_problem(60, 32, 48, 4, device=device, bias=False)
    tensors = [problem.x.to(x), problem.weight.to(weight)]
    tensors += [problem.lora_a.to(adapters), problem.lora_b.to(adapters)]
    leaves = [tensors[0].requires_grad_(), *(t.requires_grad_() for t in tensors[2:])]
    inside = x if cast is None or x == F64 else cast
    try:
        with torch.autocast(device, cast or BF16, enabled=cast is not None):
            y = OP(*tensors)
    except TypeError as error:
        assert "expected" in str(error)
        fits = cast is not None or (weight == x and (adapters == x or adapters == F32 != x != F64))
        assert not fits or x == F64 or adapters == F64
        return
    assert y.dtype == inside
    y.sum().backward()
    wanted = torch.nn.functional.linear(problem.x, problem.weight + problem.lora_b @ problem.lora_a)
    torch.testing.assert_close(y.float(), wanted, rtol=0.05, atol=0.1)
    for tensor in leaves:
        assert tensor.grad.dtype == tensor.dtype
        assert tensor.grad.isfinite().all()


# ---- repeats, threads, lifetimes ----


def test_layers_in_eight_threads(isa, device):
    """Races between callers: eight Python threads, a seed of its own each."""
    problem = make_problem(96, 100, 80, 8, device=device)
    alone = [run_ours(problem, 0.3, seed=seed) for seed in range(8)]

    def agrees(seed):
        runs = [run_ours(problem, 0.3, seed=seed) for _ in range(10)]
        return all(
            torch.equal(run.dlora_a, alone[seed].dlora_a) and torch.equal(run.y, alone[seed].y)
            for run in runs
        )

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(agrees, range(8)))


def test_nothing_outlives_its_owner(isa, device):
    """torchtune#904: a cache kept models alive."""
    problem = make_problem(60, 40, 30, 4, device=device)
    tensors = [leaf(t.clone()) for t in (problem.x, problem.lora_a, problem.lora_b)]
    weight = problem.weight.clone()
    packed = lora_ext.pack_weight(weight, backward=True)
    y = lora_ext.lora_linear(tensors[0], packed, *tensors[1:], dropout_p=0.5)
    y.sum().backward()
    watched = [weakref.ref(t) for t in (*tensors, weight, packed, y)]
    del tensors, weight, packed, y
    gc.collect()
    assert [ref() for ref in watched] == [None] * len(watched)


def test_memory_is_flat_over_many_calls(isa):
    """torchtune#904 again: 300 calls allocate no more than the first few."""
    if "libasan" in Path("/proc/self/maps").read_text():
        pytest.skip("AddressSanitizer keeps 256 MiB of what was freed, to see a later use of it")
    problem = make_problem(256, 256, 256, 16, (BF16, F32))

    def resident():  # a peak would be that of an earlier test, or of what started the process
        for _ in range(150):
            run_ours(problem, 0.3)
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    first = resident()
    assert resident() <= first + (4 << 20)


# ---- CUDA ----


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_tensors_on_a_device_that_is_not_the_current_one():
    """pytorch#54077, FBGEMM#5113: a missing device guard."""
    problem = make_problem(60, 40, 30, 4, device="cuda:1", scaling=0.5, integers=3)
    with torch.cuda.device(0):
        run = run_integers(problem, 0.5)
    assert run.y.device == torch.device("cuda:1")
