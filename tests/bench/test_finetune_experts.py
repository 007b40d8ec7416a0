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
from benchmarks.finetune.trained_models import make_variants
from benchmarks.finetune_experts import claims, mixture, models


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
    assert training.largest_deviation(curves["ours"].losses, curves["peft"].losses) < 1e-3
    assert curves["frozen"].losses[1:] != curves["ours"].losses[1:]


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
        "fused": 4,
        "layers": 4,
        "folder": {"texts": 5, "same_answers": 5, "difference": 1e-6},
    }


def test_the_report_says_what_holds(tmp_path):
    good = document()
    good["checks"] = claims.evaluate(good)
    assert all(check["holds"] for check in good["checks"])
    path = tmp_path / "results.json"
    results.write(good, path)
    text = report.text(results.read(path))
    assert "lora_ext's steps take 0.43" in text and "MISS" not in text
    assert json.loads(path.read_text())["kind"] == "finetune_experts"


@pytest.mark.parametrize(
    "change",
    [
        {"upcycled": 1.0},
        {"deviation": 0.1},
        {"deviation": None},
        {"accuracy": {"ours": 0.25}},
        {"fused": 3},
        {"folder": {"texts": 5, "same_answers": 4, "difference": 1e-6}},
        {"memory": {"ours": {"peak": 2}, "peft": {"peak": 1}}},
    ],
    ids=str,
)
def test_a_claim_that_does_not_hold_is_said(change):
    failed = [check for check in claims.evaluate(document() | change) if not check["holds"]]
    assert len(failed) == 1
