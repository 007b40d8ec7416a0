"""The kernel route on a GPU: graphs, streams, far offsets, and agreement with the library route."""

import op_calls
import pytest
import torch
from helpers import BF16, F16, F32, short, smallest_of_each_kind

import lora_ext
from lora_ext import _C
from lora_ext.autotune import Entry, Shape
from lora_ext.kernels.kernel_checks import check_kernels

pytestmark = pytest.mark.gpu

# In float32 the library multiplies, and the kernels of dropout are ours.
dtypes = pytest.mark.parametrize("dtype", [BF16, F32], ids=short)


@pytest.fixture(autouse=True, params=["kernel", "hybrid"])
def route(cuda, request):
    """The kernels, whatever the planner prefers on this card."""
    lora_ext.kernels.set_cuda_route(request.param)
    yield request.param
    lora_ext.kernels.set_cuda_route("auto")


def operands(rows, in_features, out_features, rank, dtype=BF16, adapters=None):
    def made(*shape, size=1.0, to=dtype):
        return (size * torch.randn(*shape, device="cuda")).to(to)

    adapters = adapters or dtype
    x, w = made(rows, in_features), made(out_features, in_features)
    a = made(rank, in_features, size=0.1, to=adapters)
    b = made(out_features, rank, size=0.1, to=adapters)
    return x, w, a, b


def step(x, w, a, b, dropout_p=0.0):
    leaves = [t.detach().requires_grad_() for t in (x, a, b)]
    y = lora_ext.lora_linear(leaves[0], w, *leaves[1:], None, 2.0, dropout_p)
    y.backward(torch.ones_like(y))
    return (y.detach(), *(leaf.grad for leaf in leaves))


def library(*arguments, **named):
    before = _C.cuda_route()
    lora_ext.kernels.set_cuda_route("library")
    try:
        return step(*arguments, **named)
    finally:
        lora_ext.kernels.set_cuda_route(before)


def check_all_kernels():
    assert check_kernels() == {}


def assert_near(got, expected, dtype):
    for one, other in zip(got, expected, strict=True):
        allowed = (2**-8 if dtype == F16 else 2**-5) * other.abs().max()
        assert (one.double() - other.double()).abs().max() <= allowed


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["half adapters", "float32 adapters"])
@pytest.mark.parametrize(
    "shape",
    [(512, 1024, 1024, 16), (333, 515, 777, 13), (4096, 2048, 4096, 64), (1, 4096, 4096, 8)],
    ids=lambda s: "x".join(map(str, s)),
)
def test_kernels_agree_with_the_library_route(shape, dtype, wide):
    given = operands(*shape, dtype, F32 if wide else None)
    assert_near(step(*given), library(*given), dtype)
    plan = lora_ext.explain(*given)
    assert plan.forward_check == plan.backward_check == "passed", plan


def won_by(tile, shape, wide, dropout, backward):
    rows, k, n, rank = shape
    layer = Shape(rows, k, n, rank, wide, dropout)
    return Entry(layer, backward, "kernel", tile, {}).for_planner("by nobody")


def assert_tiles_agree(shape, wide, dropout_p, chosen):
    """The tiles chosen of those that the card has, forward and backward, with the library route."""
    card = _C.cuda_card(torch.device("cuda", 0))
    given = operands(*shape, BF16, F32 if wide else None)
    torch.manual_seed(5)
    expected = library(*given, dropout_p=dropout_p)
    lora_ext.kernels.set_cuda_route("auto")
    try:
        call = {"float_adapters": wide, "dropout": dropout_p > 0}
        backwards = _C.tiles_of(card, backward=True, **call)
        for tile in chosen(_C.tiles_of(card, backward=False, **call)):
            tiles = (tile, tile if tile in backwards else backwards[0])
            print(f"{tiles} of {shape}", flush=True)
            if tile == "decode":
                assert_decode_agrees(card, shape, wide)
                continue
            won = [won_by(t, shape, wide, dropout_p > 0, i == 1) for i, t in enumerate(tiles)]
            _C.replace_autotune_cache(card.name, won)
            torch.manual_seed(5)
            assert_near(step(*given, dropout_p=dropout_p), expected, BF16)
            plan = lora_ext.explain(*given, dropout_p)
            assert (plan.forward.tile, plan.backward.tile) == tiles
            assert plan.forward_check == plan.backward_check == "passed", plan
    finally:
        _C.replace_autotune_cache(card.name, [])
        lora_ext.autotune.planner_cache.load_user_caches()


def assert_decode_agrees(card, shape, wide):
    """With as many rows as its instances take at most, or fewer."""
    for rows in (1, 8, 13, 32, 64):
        few = (rows, *shape[1:])
        given = operands(*few, BF16, F32 if wide else None)
        expected = library(*given)
        _C.replace_autotune_cache(card.name, [won_by("decode", few, wide, False, False)])
        assert_near(step(*given), expected, BF16)
        plan = lora_ext.explain(*given)
        assert plan.forward.tile == "decode" and plan.forward_check == "passed", plan


@pytest.mark.parametrize(
    "rank", [8, 24, 40, 136]
)  # the tails 1, 2 and 4, and a rank of 64 and more
@pytest.mark.parametrize("wide", [False, True], ids=["half adapters", "float32 adapters"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_every_tile_agrees_with_the_library_route(rank, wide, dropout_p):
    assert_tiles_agree((520, 1096, 776, rank), wide, dropout_p, list)


# What compute-sanitizer runs, a hundred times slower. Rows of 1096 and 776 are aligned, and copied
# by TMA or 16 bytes at a time; those of 515 and 777 an element at a time.
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("rank", [24, 40])
def test_sanitized_tiles_of_each_kind(rank, dropout_p):
    assert_tiles_agree((520, 1096, 776, rank), False, dropout_p, smallest_of_each_kind)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_sanitized_odd_rows(dropout_p):
    given = operands(333, 515, 777, 13)
    torch.manual_seed(5)
    expected = library(*given, dropout_p=dropout_p)
    torch.manual_seed(5)
    assert_near(step(*given, dropout_p=dropout_p), expected, BF16)


def test_memory_that_is_freed_and_used_again_is_read_where_it_is():
    """Tensor maps are kept by address and shape: the same again after other shapes."""
    for _ in range(3):
        for rows in (512, 256, 512, 1024):
            given = operands(rows, 1024, 1024, 16)
            assert_near(step(*given), library(*given), BF16)
            del given


# On Hopper S and dS of rank 16 come from grids of their own, those of rank 40 from Y's and dX's.
@pytest.mark.parametrize("shape", [(2048, 1024, 1024, 16), (4096, 2048, 2048, 40)])
@pytest.mark.parametrize("early", [True, False])
def test_kernels_that_begin_early_give_the_same_bits(early, shape):
    given = operands(*shape)
    lora_ext.kernels.set_pdl(False)
    expected = step(*given)
    lora_ext.kernels.set_pdl(early)
    try:
        for _ in range(100):
            assert all(torch.equal(a, b) for a, b in zip(step(*given), expected, strict=True))
    finally:
        lora_ext.kernels.set_pdl(True)


def test_dropout_keeps_what_the_library_route_keeps():
    given = operands(512, 1024, 768, 16)
    torch.manual_seed(3)
    ours = step(*given, dropout_p=0.2)
    torch.manual_seed(3)
    assert_near(ours, library(*given, dropout_p=0.2), BF16)


def test_repeats_have_the_same_bits():
    given = operands(2048, 2048, 2048, 16, adapters=F32)
    first = step(*given)
    for _ in range(50):
        assert all(torch.equal(a, b) for a, b in zip(step(*given), first, strict=True))


def captured(run):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


@dtypes
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_graph_replays_have_the_same_bits(dtype, dropout_p):
    """Of the x and the seed that they find. A kernel off the current stream is not captured, and
    replay does nothing: pytorch#114048."""
    check_all_kernels()
    x, *rest = operands(1024, 1024, 1024, 16, dtype)
    seed = torch.tensor(1, device="cuda")

    def call():
        return op_calls.lora_linear(x, *rest, None, 1.0, dropout_p, seed)

    expected = call()
    graph, out = captured(call)
    for _ in range(1000):
        graph.replay()
    assert torch.equal(out, expected)
    x.copy_(torch.randn_like(x))
    seed.fill_(2)
    graph.replay()
    assert torch.equal(out, call())


@dtypes
def test_graph_replays_draw_new_masks(dtype):
    """A seed drawn on the host would be frozen into the graph."""
    check_all_kernels()
    x, w, a, b = operands(256, 256, 256, 16, dtype)
    lora_ext.lora_linear(x, w, a, b, None, 1.0, 0.5)  # loads the kernels
    graph, out = captured(lambda: lora_ext.lora_linear(x, w, a, b, None, 1.0, 0.5))
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(out, first)


@dtypes
def test_a_side_stream_is_followed(dtype):
    given = operands(1024, 1024, 1024, 16, dtype)
    torch.manual_seed(3)
    expected = step(*given, dropout_p=0.5)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # kernels on another stream would run ahead of this
        x = given[0] * 1
        torch.manual_seed(3)
        got = step(x, *given[1:], dropout_p=0.5)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_more_than_2_to_the_31_elements():
    rows, features = 2**31 // 4096 + 100, 4096
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of memory")
    x, w, a, b = operands(64, features, features, 8)
    many = torch.zeros(rows, features, device="cuda", dtype=BF16)
    many[-64:] = x
    y = lora_ext.lora_linear(many, w, a, b)
    assert_near([y[-64:]], [lora_ext.lora_linear(x, w, a, b)], BF16)
    assert not y[:-64].any()


def test_nothing_is_written_to_inputs():
    given = operands(300, 520, 264, 12, adapters=F32)
    copies = [t.clone() for t in given]
    step(*given, dropout_p=0.1)
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))


def test_card_is_described():
    card = _C.cuda_card(torch.device("cuda", 0))
    major, minor = torch.cuda.get_device_capability(0)
    assert card.arch == 10 * major + minor
    assert card.sms == torch.cuda.get_device_properties(0).multi_processor_count
