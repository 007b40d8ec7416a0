"""The fine-tuning demonstration: its training loop, what it claims and reports."""

import copy
import json

import pytest
import torch
from bench_helpers import MACHINE, TinyEncoder, summary

from benchmarks import report, results
from benchmarks.finetune import __main__ as finetune
from benchmarks.finetune import claims, classifier, trained_models, training
from benchmarks.finetune.classifier import Batch, Classifier


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    model = Classifier(TinyEncoder(), 16, 3)
    model.encoder.requires_grad_(False)
    return model


def tiny_batches(count):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(40, (count, 8, 5), generator=generator)
    mask = torch.ones(8, 5, dtype=torch.long)
    mask[:3, 4:] = 0
    return [Batch(part, mask, part[:, 0] % 3) for part in ids]


def test_training_agrees_with_peft_and_learns(tiny):
    found = trained_models.make_variants(tiny, list(trained_models.LABELS))
    batches = tiny_batches(4)
    lines = []
    curves = training.train(found, batches * 10, lines.append)
    assert training.largest_deviation(curves["ours"].losses, curves["peft"].losses) < 1e-4
    for name, curve in curves.items():
        assert len(curve.losses) == len(curve.passes.samples) == len(curve.updates.samples) == 40
        assert training.recent_loss(curve.losses, 4) < curve.losses[0], name
    memories = training.step_memories(found, batches[0])
    assert memories.keys() == curves.keys() and all(one["peak"] > 0 for one in memories.values())
    assert len(lines) == 8
    assert "step 40 of 40" in lines[-1]
    logits = training.predict(found["ours"].model, batches)
    assert logits.shape == (32, 3)
    assert found["ours"].model.training
    labels = torch.cat([batch.labels for batch in batches])
    logits[:8] = -torch.nn.functional.one_hot(labels[:8], 3).float()
    logits[8:] = torch.nn.functional.one_hot(labels[8:], 3)
    assert training.accuracy(logits, batches) == 0.75


def test_variants_start_alike_and_leave_the_base(tiny):
    before = copy.deepcopy(tiny.state_dict())
    found = trained_models.make_variants(tiny, list(trained_models.LABELS))
    ours = found["ours"].trainable
    assert sum(name.startswith("encoder.") for name in ours) == 8
    for name in ("peft", "ours_dropout", "peft_dropout"):
        assert found[name].trainable.keys() == ours.keys()
        assert all(torch.equal(p, ours[key]) for key, p in found[name].trainable.items())
    assert found["frozen"].trainable.keys() == {"head.weight", "head.bias"}
    training.train(found, tiny_batches(1), lambda line: None)
    assert all(torch.equal(tensor, before[key]) for key, tensor in tiny.state_dict().items())


def test_training_order_groups_by_length():
    lengths = [(i * 37) % 60 for i in range(1000)]
    order = classifier.training_order(lengths, 16, seed=3)
    assert order == classifier.training_order(lengths, 16, seed=3)
    assert order != classifier.training_order(lengths, 16, seed=4)
    assert len(order) == len(set(order)) == 992
    rows = [[lengths[i] for i in order[start : start + 16]] for start in range(0, 992, 16)]
    padding = sum(16 * max(row) - sum(row) for row in rows)
    assert padding < 0.2 * sum(map(sum, rows))
    assert rows != sorted(rows)


def document():
    """A finished run of three steps in which every claim holds."""
    timing = summary(10.0, n=3, samples=[9.0, 10.0, 11.0])
    names = list(trained_models.LABELS)
    same = {"identical": False, "same_answers": 500, "difference": 1e-6}
    found = {
        **results.new_document("finetune", MACHINE),
        "data": {
            "train": {"one area": 1000, "another": 1500},
            "held_out": {"one area": 300, "another": 200},
            "majority": 0.6,
            "examples": {"one area": "A sentence of one area.", "another": "Another sentence."},
            "definitions_on_both_sides": 0,
            "largest_similarity": 0.5,
        },
        "settings": {
            "rank": 16,
            "alpha": 32,
            "targets": trained_models.TARGETS,
            "rows": 16,
            "steps": 3,
            "tokens": 960,
            "learning_rate": 2e-3,
            "head_only_rate": 3e-2,
            "trainable": 1000,
            "parameters": 100000,
            "encoder_bytes": 400000,
        },
        "losses": {name: [2.0, 1.5, 1.0] for name in names},
        "deviation": 1e-6,
        "timing": {name: timing for name in names},
        "updates": {name: timing for name in names},
        "accuracy": {name: 0.8 for name in names},
        "memory": {name: {"peak": 2**20} for name in names},
        "round_trip": {
            "texts": 500,
            "unadapted": {"identical": False, "same_answers": 90, "difference": 0.7},
            "reloaded": {"identical": True, "same_answers": 500, "difference": 0.0},
            "merged": same,
            "peft": same,
            "files": {"adapter_model.safetensors": 4000},
        },
        "peft_files": {"adapter_model.safetensors": 4000},
        "half": {"skipped": "a frozen step takes 90 ms, 10 ms in float32"},
        "seconds": 100.0,
    }
    found = json.loads(json.dumps(found))
    found["checks"] = claims.evaluate(found)
    return found


BREACHES = {
    "too few texts": lambda d: d["data"]["train"].update(another=900),
    "too few held-out texts": lambda d: d["data"]["held_out"].update(another=50),
    "a definition on both sides": lambda d: d["data"].update(definitions_on_both_sides=1),
    "near duplicates": lambda d: d["data"].update(largest_similarity=0.6),
    "accuracy": lambda d: d["accuracy"].update(ours_dropout=0.69),
    "other losses": lambda d: d.update(deviation=2e-3),
    "losses that are no numbers": lambda d: d.update(deviation=None),
    "reloaded differs": lambda d: d["round_trip"]["reloaded"].update(identical=False),
    "nothing to load": lambda d: d["round_trip"]["unadapted"].update(identical=True),
    "merged answers otherwise": lambda d: d["round_trip"]["merged"].update(same_answers=499),
    "merged logits differ": lambda d: d["round_trip"]["merged"].update(difference=1e-3),
    "merged logits are no numbers": lambda d: d["round_trip"]["merged"].update(difference=None),
    "PEFT answers otherwise": lambda d: d["round_trip"]["peft"].update(same_answers=499),
}


@pytest.mark.parametrize("breach", BREACHES.values(), ids=BREACHES)
def test_each_claim_can_fail(breach):
    found = document()
    assert all(check["holds"] for check in found["checks"])
    breach(found)
    found["checks"] = claims.evaluate(found)
    assert [check["holds"] for check in found["checks"]].count(False) == 1
    assert "**NO**" in report.text(found)


def test_exit_status_says_that_a_claim_fails(monkeypatch, tmp_path, capsys):
    found = document()
    monkeypatch.setattr(finetune, "run", lambda options, say: found)
    arguments = ["--out", str(tmp_path)]
    assert finetune.main(arguments) == 0
    found["deviation"] = 0.5
    found["checks"] = claims.evaluate(found)
    assert finetune.main(arguments) == 1
    assert "DOES NOT HOLD: without dropout" in capsys.readouterr().err
    assert json.loads((tmp_path / "results.json").read_text()) == found


def test_report_shows_every_model_and_text(tmp_path):
    found = document()
    path = report.write(found, tmp_path / "results.json")
    text = path.read_text()
    for label in trained_models.LABELS.values():
        assert f"| {label}" in text
    for expected in (
        "A sentence of one area.",
        "80.0%",
        "60.0%",
    ):
        assert expected in text
    assert "Not measured: a frozen step takes 90 ms" in text
