"""The demonstrations' claims: of the runs that are kept all hold, each can fail, and is said."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import report, results
from benchmarks.finetune import __main__ as finetune
from benchmarks.finetune import claims as of_one
from benchmarks.finetune_many import __main__ as finetune_many
from benchmarks.finetune_many import claims as of_many

RESULTS = Path(results.__file__).parent / "results"
RUNS = {
    kind: results.read(min(RESULTS.rglob(f"{kind}/results.json")))
    for kind in ("finetune", "finetune_many")
}

BREACHES = {
    "too few texts": lambda d: d["data"].update(train=dict.fromkeys(d["data"]["train"], 222)),
    "too few held-out texts": lambda d: d["data"].update(
        held_out=dict.fromkeys(d["data"]["held_out"], 44)
    ),
    "a definition on both sides": lambda d: d["data"].update(definitions_on_both_sides=1),
    "near duplicates": lambda d: d["data"].update(largest_similarity=0.6),
    "accuracy": lambda d: d["accuracy"].update(ours_dropout=d["data"]["majority"] + 0.09),
    "other losses": lambda d: d.update(deviation=2e-3),
    "losses that are no numbers": lambda d: d.update(deviation=None),
    "reloaded differs": lambda d: d["round_trip"]["reloaded"].update(identical=False),
    "nothing to load": lambda d: d["round_trip"]["unadapted"].update(identical=True),
    "merged answers otherwise": lambda d: d["round_trip"]["merged"].update(same_answers=1),
    "merged logits differ": lambda d: d["round_trip"]["merged"].update(difference=1e-3),
    "merged logits are no numbers": lambda d: d["round_trip"]["merged"].update(difference=None),
    "PEFT answers otherwise": lambda d: d["round_trip"]["peft"].update(same_answers=1),
}
BREACHES_OF_MANY = {
    "other losses than alone": lambda d: d["differences"]["in_turn"].__setitem__(3, 2e-3),
    "other losses than PEFT": lambda d: d["differences"]["peft"].__setitem__(7, 2e-3),
    "no number": lambda d: d["differences"]["peft"].__setitem__(0, None),
    "other losses with dropout": lambda d: d["differences"]["dropout"].__setitem__(0, 2e-3),
    "another answer": lambda d: d["served"]["float32"].update(same_answers=95),
    "other logits": lambda d: d["served"]["float32"].update(difference=1e-3),
    "other logits in bfloat16": lambda d: d["served"]["bfloat16"].update(difference=0.1),
    "logits that are no numbers": lambda d: d["served"]["bfloat16"].update(difference=None),
    "accuracy of served texts": lambda d: d["served"]["float32"].update(accuracy=0.6),
    "slower than in turn": lambda d: d["timing"]["in_turn"].update(samples=[1.0] * 100),
    "slower than PEFT": lambda d: d["timing"]["peft"].update(samples=[1.0] * 100),
}


@pytest.mark.parametrize(
    ("kind", "claims", "breach"),
    [
        pytest.param(kind, claims, breach, id=f"{kind}, {name}")
        for kind, claims, breaches in (
            ("finetune", of_one, BREACHES),
            ("finetune_many", of_many, BREACHES_OF_MANY),
        )
        for name, breach in breaches.items()
    ],
)
def test_each_claim_can_fail(kind, claims, breach):
    found = copy.deepcopy(RUNS[kind])
    assert found["checks"] == claims.evaluate(found)
    assert all(check["holds"] for check in found["checks"])
    breach(found)
    found["checks"] = claims.evaluate(found)
    assert [check["holds"] for check in found["checks"]].count(False) == 1
    assert "**MISS**" in report.text(found)


@pytest.mark.parametrize(
    ("demo", "kind", "said"),
    [
        (finetune, "finetune", "DOES NOT HOLD: at least 2000"),
        (finetune_many, "finetune_many", "DOES NOT HOLD: without dropout"),
    ],
)
def test_a_claim_that_fails_is_said_and_decides_the_exit_status(demo, kind, said, tmp_path, capsys):
    found = copy.deepcopy(RUNS[kind])
    suite = replace(demo.SUITE, measure=lambda options, document, path: document.update(found))
    assert suite.main(["--out", str(tmp_path)]) == 0
    assert said not in "".join(capsys.readouterr())
    found["checks"][0]["holds"] = False
    assert suite.main(["--out", str(tmp_path)]) == 1
    assert said in "".join(capsys.readouterr())
    assert results.read(tmp_path / "results.json") == found


def test_an_interrupted_demonstration_has_no_report(tmp_path, capsys):
    def interrupt(options, document, path):
        document["losses"] = {"ours": [1.0]}
        raise KeyboardInterrupt

    suite = replace(finetune.SUITE, measure=interrupt)
    assert suite.main(["--out", str(tmp_path)]) == 130
    assert not list(tmp_path.iterdir()) and "interrupted" in capsys.readouterr().err


def test_a_half_encoder_that_was_not_measured_has_a_reason_in_the_report():
    found = RUNS["finetune"] | {"half": {"skipped": "a frozen step takes 90 ms"}}
    assert "Not measured: a frozen step takes 90 ms." in report.text(found)
