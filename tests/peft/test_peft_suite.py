"""PEFT's own tests on accelerated models, and what `scripts/peft_suite.py` makes of them."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def load(name):
    path = ROOT / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


suite = load("peft_suite")
quantized_suite = load("peft_suite_quantized")

# Loads an adapter by its name, its model by the name that the adapter has for it.
LOADS = """
import peft, transformers
name = "peft-internal-testing/tiny-OPTForCausalLM-lora"
model = peft.AutoPeftModelForCausalLM.from_pretrained(name)
base = model.peft_config["default"].base_model_name_or_path
tokens = transformers.AutoTokenizer.from_pretrained(base)("a word", return_tensors="pt")
assert model(**tokens).logits.shape[1] == len("a word")
"""


def entry(outcome="passed", lora=True, paths=(), why=""):
    return {"outcome": outcome, "lora": lora, "paths": dict.fromkeys(paths, 1), "why": why}


def test_what_counts():
    """LoRA cases that pass as they are; a case that is missing or fails accelerated is named."""
    plain = {name: entry() for name in ("fast", "slow", "bare", "broken", "gone")}
    plain |= {"offline": entry("failed", why="no network"), "other method": entry(lora=False)}
    plain["no model"] = entry("failed", lora=False)
    accelerated = {
        "fast": entry(paths=["fused", "peft: arguments beside x"]),
        "slow": entry(paths=["peft: a variant of LoRA other than DoRA"]),
        "bare": entry(),
        "broken": entry("failed", paths=["added"], why="assert 1 == 2\nmore"),
        "offline": entry("failed"),
    }
    text = suite.report({"test_some": (plain, accelerated)})
    assert "**3 of 5 cases pass, 60.00 %**" in text
    assert "| test_some | 5 | 3 | 1 of 2 | 1 of 1 | 1 of 2 |" in text
    assert "- `broken`: failed. assert 1 == 2" in text and "- `gone`: missing." in text
    assert "| a variant of LoRA other than DoRA | 1 |" in text
    assert "1 failed as they are" in text and "- `offline`: no network" in text
    assert "Not counted: 1 fail so before" in text
    assert "that can be run: none." in text
    empty = suite.report({"test_some": (plain, accelerated), "test_without": ({}, {})})
    assert "that can be run: test_without." in empty


def test_the_document_has_the_promised_share():
    text = suite.DOCUMENT.read_text()
    passed, cases = map(int, text.split("**")[1].split(" cases")[0].split(" of "))
    assert cases > 4000 and passed / cases >= 0.95


def test_made_models_load_by_name(tmp_path, monkeypatch):
    """With a hub of one model and one adapter and no network, in another process."""
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub = load("peft_suite_hub")
    hub.make_model(tmp_path, hub.TINY_OPT)
    hub.make_adapter(tmp_path, "peft-internal-testing/tiny-OPTForCausalLM-lora")
    environment = {**os.environ, "HF_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", LOADS], env=environment, check=True)


def test_edits_leave_assertions():
    edited = quantized_suite.edited
    text = 'x = model.to("cuda")\nassert x.device.type == "cpu"\n'
    assert edited("test_common_gpu", text) == text.replace('"cuda"', '"cpu"')
    with pytest.raises(ValueError, match="leave assertions"):
        edited("test_common_gpu", 'assert x.device.type == "cuda"\n')
    with pytest.raises(ValueError, match="a file without it"):
        edited("test_quantization", "TEST_CASES = []\n")
    table = edited("test_quantization", "TEST_CASES = [1]\n\n\ndef _peft_id(val):\n    pass\n")
    names = {}
    exec(table, names)
    assert {kind.__name__ for kind, _ in names["TEST_CASES"]} == {"LoraConfig"}


def test_the_document_has_quantised_bases():
    text = quantized_suite.DOCUMENT.read_text().split(quantized_suite.HEADING)[1]
    found = re.findall(r"\*\*(\d+) of (\d+) cases .*\*\*; a fused path ran in (\d+) of", text)
    for (passed, cases, fused), least in zip(found, (10, 20), strict=True):
        assert int(cases) > 90 and passed == cases and int(fused) > least


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    try:
        return suite.unpacked(tmp_path_factory.mktemp("release"))
    except subprocess.CalledProcessError:
        pytest.skip("peft's source distribution could not be downloaded")


# File -> the models that it loads, and how many cases run a fast forward at least.
RUN = {
    "test_custom_models": ([], 300),
    "test_target_parameters": (
        [
            "hf-internal-testing/tiny-random-LlamaForCausalLM",
            "trl-internal-testing/tiny-GptOssForCausalLM",
            "trl-internal-testing/tiny-Llama4ForCausalLM",
        ],
        60,
    ),
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", RUN)
def test_pefts_own_tests(name, release, tmp_path, monkeypatch):
    """At least 95 % of a file's LoRA cases pass, all of those on a fast path but the expected."""
    models, least = RUN[name]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub = load("peft_suite_hub")
    for model in models:
        hub.make_model(tmp_path / "hub", model)
    ways = (True, False)
    plain, accelerated = (suite.run(release, name, way, tmp_path / "hub") for way in ways)
    cases = [name for name, one in plain.items() if one["outcome"] == "passed" and one["lora"]]
    passed = [name for name in cases if accelerated[name]["outcome"] == "passed"]
    fast = [name for name in cases if suite.group_of(accelerated[name]) == "fast"]
    assert len(passed) >= 0.95 * len(cases) > 0
    assert len(fast) > least and set(fast) - set(passed) == set(fast) & set(suite.EXPECTED)
