"""The demonstration of experts: the upcycled model, training beside PEFT, claims and report."""

import copy
import json

import pytest
import torch
from bench_helpers import MACHINE, summary
from transformers import BertConfig, BertModel

from benchmarks import report, results
from benchmarks.finetune import training
from benchmarks.finetune.classifier import Batch, Classifier
from benchmarks.finetune.data import Text
from benchmarks.finetune.trained_models import make_variants
from benchmarks.finetune_experts import claims, mixture, models, two_tasks
from benchmarks.finetune_many.tasks import Task


@pytest.fixture
def encoder():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
    torch.manual_seed(0)
    config = BertConfig(num_attention_heads=2, hidden_dropout_prob=0.0, **sizes)
    config.attention_probs_dropout_prob = 0.0
    return BertModel(config, add_pooling_layer=False).requires_grad_(False)


def batches(count):
    ids = torch.randint(40, (count, 8, 5), generator=torch.Generator().manual_seed(0))
    return [Batch(part, torch.ones_like(part), part[:, 0] % 3) for part in ids]


def test_the_mixture_starts_as_the_dense_model_and_trains_as_peft(encoder):
    dense = Classifier(copy.deepcopy(encoder), 16, 3)
    base = Classifier(mixture.upcycled(encoder), 16, 3)
    base.head.load_state_dict(dense.head.state_dict())
    data = batches(6)
    expected = training.predict(dense, data)
    torch.testing.assert_close(training.predict(base, data), expected)
    found = make_variants(base, list(models.LABELS), models.adapted)
    names = [name for name in found["ours"].trainable if "experts" in name]
    assert len(names) == 8  # two factors of two stacks in two layers
    curves = training.train(found, data, lambda line: None)
    both = [found[name].model for name in ("ours", "peft")]
    same = mixture.steps_with_same_routes(*both, len(data))
    losses = [curves[name].losses[:same] for name in ("ours", "peft")]
    assert same >= 2 and training.largest_deviation(*losses) < 1e-3
    router = next(each for each in both[1].modules() if isinstance(each, mixture.Router))
    router.routes[1] = b"others"
    assert mixture.steps_with_same_routes(*both, len(data)) == 1
    assert curves["frozen"].losses[1:] != curves["ours"].losses[1:]


def tokenizer(sentences, **words):
    if isinstance(sentences, str):
        return {"input_ids": [ord(letter) % 40 for letter in sentences]}
    rows = [torch.tensor(tokenizer(sentence)["input_ids"]) for sentence in sentences]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def test_two_tasks_in_one_batch_are_each_alone_and_pefts(encoder, monkeypatch):
    monkeypatch.setattr(two_tasks, "DROPOUT", 0.4)  # of other masks the losses are seen to differ
    letters = "abcdefgh"
    texts = [Text(letters[: 3 + i % 5] + letters[i % 8], i % 2, str(i)) for i in range(24)]
    tasks = [Task("first", tuple(texts), ()), Task("second", tuple(texts[::-1]), ())]
    base, lines = mixture.upcycled(encoder), []
    found = two_tasks.two_tasks(base, 16, tasks, 12, tokenizer, lines.append)
    assert found["steps"] == 12 and len(lines) == 5
    assert max(found["differences"]["peft"]) < 1e-5
    assert max(found["differences"]["dropout"]) < 1e-5
    losses = found["losses"]
    assert losses["ours_dropout"][0] == pytest.approx(losses["ours"][0], rel=1e-5)  # B is zero
    assert losses["ours_dropout"][1:] != losses["ours"][1:]
    assert found["timing"].keys() == found["memory"].keys() == two_tasks.LABELS.keys()
    assert [len(two_tasks.passes(found, "peft", place)) for place in range(2)] == [4, 4]


def trained_two_tasks(**changes):
    times = zip(two_tasks.LABELS, (100, 90, 400), strict=True)
    found = {
        "steps": 4,
        "passes": 4,
        "rows": 4,
        "tasks": [{"name": n, "rank": 4, "rate": 1e-3} for n in ("first", "second")],
        "losses": {
            name: [[0.7, 0.6], [0.5, 0.5], [0.4, 0.4], [0.3, 0.2]] for name in two_tasks.LABELS
        },
        "timing": {name: summary(ms) for name, ms in times},
        "differences": {"peft": [1e-6, 1e-6], "dropout": [0.0, 1e-6]},
        "memory": {name: {"peak": 1 << 20} for name in two_tasks.LABELS},
    }
    return found | changes


def document():
    """A finished run in which every claim holds."""
    found = results.new_document("finetune_experts", MACHINE)
    return found | {
        "complete": True,
        "seconds": 100.0,
        "data": {"majority": 0.2},
        "settings": {"steps": 3, "rows": 16, "trainable": 10, "parameters": 100},
        "losses": {name: [1.0, 0.9, 0.8] for name in models.LABELS},
        "timing": {n: summary(ms) for n, ms in zip(models.LABELS, (100, 130, 300), strict=True)},
        "memory": {n: {"peak": p << 20} for n, p in zip(models.LABELS, (8, 9, 20), strict=True)},
        "accuracy": dict.fromkeys(models.LABELS, 0.5),
        "upcycled": 1e-6,
        "deviation": 1e-5,
        "same_routes": 3,
        "fused": 4,
        "layers": 4,
        "folder": {"texts": 5, "same_answers": 5, "difference": 1e-6},
        "two_tasks": trained_two_tasks(),
    }


def test_the_report_says_what_holds(tmp_path):
    good = document()
    good["checks"] = claims.evaluate(good)
    assert all(check["holds"] for check in good["checks"])
    path = tmp_path / "results.json"
    results.write(good, path)
    text = report.write(results.read(path), path).read_text()
    assert "lora_ext's steps take 0.43" in text and "MISS" not in text
    assert "0.700 to 0.300" in text and "0.25 (0.25-0.25)" in text
    assert "](losses.png)" in text and (tmp_path / "losses.png").stat().st_size > 1000
    assert json.loads(path.read_text())["kind"] == "finetune_experts"


@pytest.mark.parametrize(
    "change",
    [
        {"upcycled": 1.0},
        {"deviation": 0.1},
        {"deviation": None},
        {"same_routes": 1},
        {"accuracy": {"ours": 0.25}},
        {"fused": 3},
        {"folder": {"texts": 5, "same_answers": 4, "difference": 1e-6}},
        {"memory": {"ours": {"peak": 2}, "peft": {"peak": 1}}},
        {"two_tasks": trained_two_tasks(differences={"peft": [1e-6, 2e-3], "dropout": [0, 0]})},
        {"two_tasks": trained_two_tasks(differences={"peft": [0, 0], "dropout": [None, 0]})},
        {"two_tasks": trained_two_tasks(losses=dict.fromkeys(two_tasks.LABELS, [[0.7, 0.7]] * 4))},
        {"two_tasks": trained_two_tasks(timing=dict.fromkeys(two_tasks.LABELS, summary(1.0)))},
    ],
    ids=lambda change: ", ".join(change),
)
def test_a_claim_that_does_not_hold_is_said(change):
    failed = [check for check in claims.evaluate(document() | change) if not check["holds"]]
    assert len(failed) == 1
