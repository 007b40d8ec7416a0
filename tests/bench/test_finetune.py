"""The fine-tuning demonstration's training loop."""

import copy

import pytest
import torch
from bench_helpers import TinyEncoder

from benchmarks.finetune import classifier, trained_models, training
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
