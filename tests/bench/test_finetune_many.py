"""The demonstration of many adapters: tasks, training among others and alone, serving."""

import pytest
import torch
from bench_helpers import TinyEncoder

from benchmarks.finetune.classifier import Batch
from benchmarks.finetune.data import Dataset, Text
from benchmarks.finetune_many import claims, serving, tasks, training
from benchmarks.finetune_many.tenants import make_tenants

COUNT, WIDTH = 3, 16


def tenants(kind="ours", dropout=0.0):
    torch.manual_seed(0)
    encoder = TinyEncoder().requires_grad_(False)
    return make_tenants(encoder, WIDTH, COUNT, kind, dropout)


def batches(count):
    rows = COUNT * tasks.ROWS
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(40, (count, rows, 5), generator=generator)
    mask = torch.ones(rows, 5, dtype=torch.long)
    mask[: tasks.ROWS, 4:] = 0
    return [Batch(part, mask, part[:, 0] % 2) for part in ids]


def runs():
    return {
        "together": (tenants(), training.together),
        "in_turn": (tenants(), training.in_turn),
        "peft": (tenants("peft"), training.in_turn),
    }


def test_training_together_is_training_alone_and_pefts():
    lines = []
    every = runs()
    losses, times = training.train(every, batches(12), lines.append)
    for name in ("in_turn", "peft"):
        assert max(training.largest_difference(losses["together"], losses[name])) < 1e-5
    assert len(losses["together"]) == 12 and len(losses["together"][0]) == COUNT
    assert all(len(timing.samples) == 12 for timing in times.values())
    assert len(lines) == 4
    first, last = losses["together"][0], losses["together"][-1]
    assert first != last
    trained, other = every["together"][0].parameters, every["peft"][0].parameters
    for mine, theirs in zip(trained, other, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    peaks = training.peaks(every, batches(1)[0])
    assert peaks.keys() == every.keys() and all(one["peak"] > 0 for one in peaks.values())


def test_a_task_alone_has_the_masks_that_it_has_among_the_others():
    found = training.with_dropout(lambda: tenants(dropout=0.4), batches(4))
    assert max(training.largest_difference(found["together"], found["alone"])) < 1e-5
    other = training.with_dropout(lambda: tenants(dropout=0.4), batches(4), seed=9)
    assert max(training.largest_difference(found["together"], other["together"])) > 1e-3


def test_serving_mixed_and_one_by_one():
    served = tenants()
    training.train({"together": (served, training.together)}, batches(6), lambda line: None)
    (batch,) = batches(1)
    owners = [2, 0, 1, 1] * 3
    requests = serving.Requests(
        [batch],
        [owners],
        [
            Batch(batch.ids[i : i + 1], batch.mask[i : i + 1], batch.labels[i : i + 1])
            for i in range(12)
        ],
    )
    mixed = serving.serve_together(served, requests)
    single = serving.serve_one_by_one(served, requests)
    found = serving.compared(mixed, single, requests)
    assert found["same_answers"] == found["texts"] == 12 and found["difference"] < 1e-5
    others = serving.Requests([batch], [owners[::-1]], requests.singles)
    wrong = serving.compared(serving.serve_together(served, others), single, requests)
    assert wrong["difference"] > 1e-2
    half = serving.in_bfloat16(served)
    in_half = serving.serve_together(half, requests)
    found = serving.compared(in_half, serving.serve_one_by_one(half, requests), requests)
    assert found["difference"] < claims.MOST_IN_BFLOAT16
    assert not torch.equal(in_half, mixed)
    assert served.model.training


def test_tasks_are_balanced_and_keep_the_split():
    def texts(part):
        return tuple(Text(f"{part} {i} {a}", a, f"{part}{i}") for a in range(9) for i in range(20))

    dataset = Dataset(tuple(f"area {a}" for a in range(9)), texts("train"), texts("held out"))
    found = tasks.tasks_of(dataset)
    assert [task.name for task in found] == [f"area {a}" for a in range(8)]
    for place, task in enumerate(found):
        for part, name in ((task.train, "train"), (task.held_out, "held out")):
            assert len(part) == 40 and sum(text.label for text in part) == 20
            assert all(text.sentence.startswith(name) for text in part)
            own = {text.sentence for text in part if text.label}
            assert own == {f"{name} {i} {place}" for i in range(20)}


def tokenizer(sentences, **words):
    if isinstance(sentences, str):
        return {"input_ids": list(range(len(sentences.split()) + 2))}
    lengths = [len(sentence.split()) + 2 for sentence in sentences]
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": mask * 7, "attention_mask": mask}


def test_batches_have_rows_of_each_task_of_similar_length():
    def task(name, label):
        texts = (Text("word " * (1 + i % 9), label, f"{name}{i}") for i in range(40))
        return tasks.Task(name, tuple(texts), ())

    found = tasks.mixed_batches([task("a", 0), task("b", 1)], 8, tokenizer)
    assert len(found) == 8
    for batch in found:
        assert batch.labels.tolist() == [0] * 4 + [1] * 4
        part = tasks.part_of(batch, 1)
        assert part.labels.tolist() == [1] * 4
        assert part.ids.shape[1] == part.mask.sum(1).max() <= batch.ids.shape[1]
    with pytest.raises(ValueError, match="at most 10 steps"):
        tasks.mixed_batches([task("a", 0)], 11, tokenizer)
