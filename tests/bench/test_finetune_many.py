"""The demonstration of many adapters: tasks, training among others and alone, serving, claims."""

import copy
import json

import pytest
import torch
from bench_helpers import MACHINE, TinyEncoder, summary

from benchmarks import report, results
from benchmarks.finetune.classifier import Batch
from benchmarks.finetune.data import Dataset, Text
from benchmarks.finetune_many import __main__ as demo
from benchmarks.finetune_many import claims, many_report, serving, tasks, training
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


def document():
    """A finished run of three steps in which every claim holds."""
    steps = [[0.7] * 8, [0.6] * 8, [0.5] * 8]
    served = {"texts": 96, "same_answers": 96, "difference": 1e-6, "accuracy": 0.8}
    names = {"together": 10.0, "in_turn": 20.0, "peft": 30.0}
    found = {
        **results.new_document("finetune_many", MACHINE),
        "tasks": [{"name": f"area {a}", "rank": 4, "rate": 1e-3} for a in range(8)],
        "settings": {"steps": 3, "rows": 4},
        "losses": {name: steps for name in names},
        "timing": {name: summary(ms, n=3, samples=[ms] * 3) for name, ms in names.items()},
        "differences": {name: [1e-6] * 8 for name in ("in_turn", "peft", "dropout")},
        "served": {"float32": served, "bfloat16": {**served, "same_answers": 95}},
        "memory": {name: {"peak": 2**20} for name in names},
        "seconds": 100.0,
    }
    found = json.loads(json.dumps(found))
    found["checks"] = claims.evaluate(found)
    return found


BREACHES = {
    "other losses than alone": lambda d: d["differences"]["in_turn"].__setitem__(3, 2e-3),
    "other losses than PEFT": lambda d: d["differences"]["peft"].__setitem__(7, 2e-3),
    "no number": lambda d: d["differences"]["peft"].__setitem__(0, None),
    "other losses with dropout": lambda d: d["differences"]["dropout"].__setitem__(0, 2e-3),
    "another answer": lambda d: d["served"]["float32"].update(same_answers=95),
    "other logits": lambda d: d["served"]["float32"].update(difference=1e-3),
    "other logits in bfloat16": lambda d: d["served"]["bfloat16"].update(difference=0.1),
    "logits that are no numbers": lambda d: d["served"]["bfloat16"].update(difference=None),
    "accuracy": lambda d: d["served"]["float32"].update(accuracy=0.6),
    "slower than in turn": lambda d: d["timing"]["in_turn"].update(samples=[9.0] * 3),
    "slower than PEFT": lambda d: d["timing"]["peft"].update(samples=[9.0] * 3),
}


@pytest.mark.parametrize("breach", BREACHES.values(), ids=BREACHES)
def test_each_claim_can_fail(breach):
    found = document()
    assert all(check["holds"] for check in found["checks"])
    breach(found)
    found["checks"] = claims.evaluate(found)
    assert [check["holds"] for check in found["checks"]].count(False) == 1


def test_pass_and_miss_are_printed_and_decide_the_exit_status(monkeypatch, tmp_path, capsys):
    found = document()
    monkeypatch.setattr(demo, "run", lambda options, say: found)
    arguments = ["--out", str(tmp_path)]
    assert demo.main(arguments) == 0
    shown = capsys.readouterr().out
    assert shown.count("pass  ") == len(found["checks"]) and "MISS" not in shown
    worse = copy.deepcopy(found)
    worse["served"]["float32"]["accuracy"] = 0.5
    worse["checks"] = claims.evaluate(worse)
    monkeypatch.setattr(demo, "run", lambda options, say: worse)
    assert demo.main(arguments) == 1
    assert "MISS  accuracy of at least 65%" in capsys.readouterr().out


def test_the_report_shows_tasks_times_and_pictures(tmp_path):
    text = report.write(document(), tmp_path / "results.json").read_text()
    for label in many_report.LABELS.values():
        assert f"| {label}" in text
    for expected in ("| area 7", "0.700", "| pass"):
        assert expected in text
