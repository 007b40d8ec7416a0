"""`lora_ext.warmup` without a GPU, on a card that is not there.

The kernels themselves are warmed up in tests/emulated/test_package.py.
"""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import lora_ext
from lora_ext import _C, autotune
from lora_ext.autotune import CacheError, Entry, Shape, planner_cache, session
from lora_ext.nn import LoRALinear

CARD = "A card of the tests"
H100 = _C.Card(90, 132, 233472, 232448, CARD)
LAYER = (1024, 4096, 16)


class FakeCard:
    """What `warmup` asks of a card, and what it did there."""

    def __init__(self):
        self.timed, self.trials, self.checked = [], [], []
        self.failures, self.out_of_memory = {}, set()
        self.before_measure = lambda: None

    def trial(self, shape, device, dtype):
        if shape in self.out_of_memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.trials.append(shape)
        return SimpleNamespace(shape=shape)

    def check(self, device, kernels, begins):
        self.checked += kernels
        return self.failures

    def measure(self, trial, card, backward):
        self.before_measure()
        self.timed.append((trial.shape, backward))
        return Entry(trial.shape, backward, "kernel", "128 x 128", {"library": 2.0})


@pytest.fixture
def card(monkeypatch, tmp_path):
    found = FakeCard()
    route = ["auto"]
    monkeypatch.setattr(_C, "with_cuda", True)
    for name, value in (
        ("cuda_card", lambda device: H100),
        ("cuda_driver", lambda: "13.0"),
        ("use_pdl", lambda: True),
        ("cuda_route", lambda: route[0]),
        ("set_cuda_route", lambda name: route.__setitem__(0, name)),
    ):
        monkeypatch.setattr(_C, name, value, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(planner_cache, "user_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(session, "Trial", found.trial)
    monkeypatch.setattr(session, "measure", found.measure)
    monkeypatch.setattr(session, "check_kernels", found.check)
    yield found
    _C.replace_autotune_cache(CARD, [])


def model(*dropouts):
    """A linear layer of LAYER's sizes for each dropout; without memory."""
    own = {"r": 16, "device": "meta", "dtype": torch.bfloat16, "adapter_dtype": torch.bfloat16}
    return torch.nn.Sequential(*(LoRALinear(4096, 1024, lora_dropout=p, **own) for p in dropouts))


def warmed(rows=64, **words):
    return lora_ext.warmup(model(0.0), rows=rows, progress=False, **words)


def planned(rows=2048):
    return _C.plan_forward(H100, _C.Problem(rows, *LAYER))


def test_without_kernels_or_a_gpu_there_is_nothing_to_warm_up(capsys):
    if _C.with_cuda and torch.cuda.is_available():
        pytest.skip("there is a card")
    found = lora_ext.warmup(model(0.0))
    assert found == autotune.Warmup(note=found.note) and str(found) == found.note
    assert "there is nothing to warm up: " in found.note and "CUDA" in found.note
    assert capsys.readouterr().err == f"lora_ext.warmup: {found.note}\n"


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (_C.Card(75, 40, 65536, 65536, CARD), "compute capability 8.0"),
        (_C.Card(0, 0, 0, 0, error="driver too old"), "CUDA cannot use the device: driver too old"),
    ],
    ids=["T4", "old driver"],
)
def test_on_a_card_without_kernels_there_is_nothing_to_warm_up(card, monkeypatch, found, words):
    monkeypatch.setattr(_C, "cuda_card", lambda device: found)
    said = []
    assert words in lora_ext.warmup(model(0.0), progress=said.append).note
    assert len(said) == 1 and not card.timed


def test_layers_are_timed_with_decode_and_training_sizes_and_kept(card):
    before = planned()
    found = lora_ext.warmup(model(0.0), progress=False)
    sizes = [1, 16, 2048]
    assert card.timed == [(Shape(m, 4096, 1024, 16), back) for m in sizes for back in (0, 1)]
    assert found.timed == len(found.entries) == 6 and not found.failed and not found.note
    assert autotune.read_cache(found.path).entries == found.entries
    assert "4096x1024 r=16 M=1, forward: kernel 128 x 128 (library 2.0 us)" in str(found)
    assert str(found).endswith(f"6 of 6 entries are new, in {found.path}")
    assert before.predicted_us and "measured" not in before.reason
    assert repr(found) == "Warmup(6 entries, 6 new, 0 failed checks)"
    plan = planned()
    assert plan.tile == "128 x 128" and plan.reason.startswith("fastest as measured on this GPU")
    assert _C.cuda_route() == "auto"


@pytest.mark.parametrize(
    ("change", "rows", "timed"),
    [
        ("nothing", [64], set()),
        ("nothing", (64, 512), {512}),
        ("another process", 64, set()),
        ("another driver", 64, {64}),
        ("another build", 64, {64}),
        ("a corrupt file", 64, {64}),
    ],
)
def test_only_what_the_cache_does_not_have_is_timed(card, monkeypatch, change, rows, timed):
    path = warmed().path
    card.timed.clear(), card.trials.clear(), card.checked.clear()
    if change == "another process":
        _C.replace_autotune_cache(CARD, [])
    elif change == "another driver":
        monkeypatch.setattr(_C, "cuda_driver", lambda: "13.1", raising=False)
    elif change == "another build":
        monkeypatch.setattr(planner_cache, "build_id", lambda: "another")
    elif change == "a corrupt file":
        path.write_text("{ half a")
    words = rf"ignores the autotune cache in {path}: .*expected JSON"
    with pytest.warns(UserWarning, match=words) if "corrupt" in change else nullcontext():
        found = warmed(rows=rows)
    assert {shape.rows for shape, _ in card.timed} == {shape.rows for shape in card.trials} == timed
    assert found.timed == len(card.timed) == 2 * len(timed) and card.checked
    assert found.path == path and autotune.read_cache(path).entries == found.entries
    assert planned(64).tile == "128 x 128"


def test_all_kernels_that_the_layers_can_take_are_checked_once_and_no_others(card):
    lora_ext.warmup(model(0.0, 0.1), rows=(64, 2048), progress=False)
    checked = [kernels.name for kernels in card.checked]
    every = {kernels.name for kernels in _C.all_kernels(H100, True)}
    assert len(set(checked)) == len(checked) and set(checked) < every
    for tile in _C.tiles_of(H100, backward=False, float_adapters=False, dropout=False):
        assert any(name.startswith(f"forward bfloat16 {tile}") for name in checked), tile
    assert not any("float16 " in name.replace("bfloat16", "") for name in checked)
    assert not any("float32 adapters" in name or "element-wise" in name for name in checked)


def test_progress_is_said(card, capsys):
    lora_ext.warmup(model(0.0), rows=64)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("lora_ext.warmup: 1 of 1: 4096x1024 r=16 M=64, forward: kernel 128")
    said = []
    lora_ext.warmup(model(0.0), rows=512, progress=said.append)
    assert len(said) == 2 and capsys.readouterr().err == ""


def test_nothing_is_timed_under_deterministic_algorithms(card, deterministic):
    found = warmed()
    assert not card.timed and card.checked  # the kernels are, all the same
    assert found.note == "nothing is timed under torch.use_deterministic_algorithms"
    assert found.entries == () and found.path is None


def test_ranks_that_read_one_file_make_the_same_choices(card, tmp_path):
    """Whatever each has measured before; what the file does not have is predicted."""
    path = tmp_path / "autotune.json"
    warmed(rows=512)
    found = warmed(cache=path)
    assert found.timed == 2 and found.path == path
    choices = [planned(64).reason, planned(512).reason]
    assert choices[0] == f"fastest as measured on this GPU, in {path}"
    assert "measured" not in choices[1]
    warmed(rows=(64, 512))  # another rank, with the user's cache
    assert path.name not in planned(64).reason and "measured" in planned(512).reason
    autotune.load_cache(path)
    assert [planned(64).reason, planned(512).reason] == choices
    card.timed.clear()
    again = warmed(cache=str(path))
    assert again.timed == 0 and not card.timed and again.entries == found.entries


@pytest.mark.parametrize("spoil", ["corrupt", "card", "versions"])
def test_a_given_file_that_does_not_fit_is_an_error_that_names_it(card, tmp_path, spoil):
    path = tmp_path / "autotune.json"
    warmed(cache=path)
    _C.replace_autotune_cache(CARD, [])
    if spoil == "corrupt":
        path.write_text(path.read_text()[:-20])
    else:
        autotune.write_cache(replace(autotune.read_cache(path), **{spoil: "another"}), path)
    card.timed.clear()
    for call in (lambda: autotune.load_cache(path), lambda: warmed(cache=path)):
        with pytest.raises(CacheError, match=f"{path}: expected"):
            call()
    assert not card.timed and "measured" not in planned(64).reason


def test_a_file_that_is_not_there_cannot_be_read(card, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        autotune.load_cache(tmp_path / "none.json")


@pytest.mark.skipif(_C.with_cuda, reason="the build has CUDA kernels")
def test_without_kernels_no_file_can_be_read(tmp_path):
    with pytest.raises(RuntimeError, match="no CUDA kernels"):
        autotune.load_cache(tmp_path / "none.json")


def test_entries_that_cannot_be_written_are_in_use_all_the_same(card, monkeypatch, tmp_path):
    def full(cache, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session, "write_cache", full)
    with pytest.warns(UserWarning, match="in use, but not saved: .*No space left"):
        warmed(rows=(64, 512))
    assert len(card.timed) == 4 and planned(64).tile == planned(512).tile == "128 x 128"
    with pytest.raises(OSError, match="No space left"):
        lora_ext.warmup(model(0.0), rows=128, cache=tmp_path / "autotune.json", progress=False)
    assert planned(128).reason.endswith("autotune.json")


def test_an_interrupt_keeps_the_shapes_timed_so_far(card):
    def interrupt():
        if len(card.timed) == 3:
            raise KeyboardInterrupt

    card.before_measure = interrupt
    with pytest.raises(KeyboardInterrupt):
        warmed(rows=(64, 512))
    assert planned(64).tile == "128 x 128" and "measured" not in planned(512).reason
    assert len(planner_cache.user_cache(planner_cache.user_file(CARD)).entries) == 2


def test_a_shape_that_does_not_fit_is_left_out(card):
    card.out_of_memory = {Shape(512, 4096, 1024, 16)}
    found = warmed(rows=(64, 512))
    assert found.timed == 2 and "M=512 does not fit into the free memory" in found.note


def test_kernels_that_fail_their_check_are_listed(card):
    card.failures = {"forward bfloat16 hybrid": "y differs"}
    found = warmed()
    assert found.failed == ("forward bfloat16 hybrid: y differs",) and "failed: " in str(found)


def test_a_device_without_an_index_is_the_current_one(card, monkeypatch, tmp_path):
    """In every function that takes a device: the driver knows no device of number -1."""
    asked = []
    monkeypatch.setattr(_C, "cuda_card", lambda device: asked.append(device) or H100)
    for device in ("cuda", torch.device("cuda"), None):
        autotune.load_cache(warmed(device=device).path, device)
    lora_ext.kernels.plan(64, 64, 64, 8, card=torch.device("cuda"))
    assert set(asked) == {torch.device("cuda", 3)} and len(asked) == 7
    lora_ext.kernels.plan(64, 64, 64, 8, card=torch.device("cuda", 1))
    assert asked[-1] == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"model": [LAYER]}, TypeError, r"expected a model, but got \[\(1024"),
        ({"rows": None}, TypeError, "expected rows as a number or several"),
        ({"rows": "4096"}, TypeError, "as a number or several, but got '4096'"),
        ({"rows": 0}, ValueError, "at least 1"),
        ({"rows": [8, 1.5]}, ValueError, "at least 1"),
        ({"dtype": torch.float32}, TypeError, "expected bfloat16 or float16"),
    ],
    ids=str,
)
def test_what_cannot_be_warmed_up_is_explained(given, error, words):
    with pytest.raises(error, match=words):
        lora_ext.warmup(**{"model": model(0.0), **given})


def test_shapes_of_a_model():
    model = torch.nn.Sequential(torch.nn.Linear(48, 32), torch.nn.Linear(32, 48))
    with pytest.raises(ValueError, match="has none"):
        autotune.shapes_of(model, [16])
    config = lora_ext.LoraConfig("all-linear", r=4, lora_dropout=0.1)
    model = lora_ext.apply_lora(model.bfloat16(), config)
    found = autotune.shapes_of(model, [16, 32])
    assert {(s.rows, s.in_features, s.out_features) for s in found} == {
        (16, 48, 32), (32, 48, 32), (16, 32, 48), (32, 32, 48)
    }  # fmt: skip
    assert all(s.rank == 4 and s.dropout for s in found)


def test_shapes_of_a_peft_model():
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(48, 32), torch.nn.Embedding(9, 7)).bfloat16()
    config = peft.LoraConfig(r=4, target_modules=["0", "1"], lora_dropout=0.1)
    found = autotune.shapes_of(peft.get_peft_model(model, config), [16])
    assert found == [autotune.Shape(16, 48, 32, 4, True, True)]


@pytest.mark.gpu
def test_a_warm_shape_is_not_slower_than_the_library_by_its_own_cache(cuda, tmp_path):
    own = {"dtype": torch.bfloat16, "adapter_dtype": torch.bfloat16, "lora_dropout": 0.05}
    path = tmp_path / "autotune.json"
    found = lora_ext.warmup(LoRALinear(1024, 1024, r=16, device=cuda, **own), 512, cache=path)
    try:
        assert autotune.read_cache(path).entries == found.entries
        for one in found.entries:
            chosen = f"{one.route} {one.tile}".strip()
            assert one.us[chosen] <= one.us["library"]
        x = torch.randn(512, 1024, device=cuda, dtype=torch.bfloat16)
        w = torch.randn(1024, 1024, device=cuda, dtype=torch.bfloat16)
        a, b = w[:16], w[:, :16].contiguous()
        assert "fastest as measured" in str(lora_ext.explain(x, w, a, b, 0.05))
    finally:
        planner_cache.load_user_caches()
