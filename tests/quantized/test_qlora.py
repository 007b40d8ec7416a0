"""QLoRA as docs/quantized.md has it, on a small model: with the line and without."""

import logging
import re
from pathlib import Path

import pytest
import torch
from peft_helpers import paths, tiny_llama

for package in ("bitsandbytes", "trl", "datasets", "accelerate"):
    pytest.importorskip(package)
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

PAGE = Path(__file__).parents[2] / "docs" / "quantized.md"
LINE = "lora_ext.accelerate(trainer.model)  # the line\n"
VOCAB = 64


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model of random weights and its tokenizer, saved."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("transformers", "trl", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    words = {f"word{i}": i for i in range(3, VOCAB)} | {"<s>": 0, "</s>": 1, "<pad>": 2}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special).save_pretrained(
        tmp_path / "model"
    )
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128}
    model = tiny_llama(**sizes, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.nightly
@pytest.mark.parametrize("more", [{"bf16": True}, {"bf16": False}], ids=["autocast", "plain"])
def test_the_guide(folder, tmp_path, monkeypatch, more):
    """The losses are PEFT's within 1e-3, with every layer on the op, and its folder is saved."""
    monkeypatch.chdir(tmp_path)
    block = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert block is not None and LINE in block[1]
    texts = [" ".join(f"word{3 + (7 * i + j) % (VOCAB - 3)}" for j in range(12)) for i in range(64)]
    more |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "seed": 5}
    losses, kinds = {}, {}
    for way, code in (("ours", block[1]), ("peft", block[1].replace(LINE, ""))):
        torch.manual_seed(1)
        names = {"folder": str(folder), "texts": texts, "more": more}
        exec(compile(code, PAGE.name, "exec"), names)
        history = names["trainer"].state.log_history
        losses[way] = [entry["loss"] for entry in history if "loss" in entry]
        kinds[way] = set(paths(names["trainer"].model).values())
        assert (tmp_path / "qlora" / "adapter" / "adapter_model.safetensors").exists()
    assert kinds == {"ours": {"fused"}, "peft": {"peft"}}
    assert losses["ours"][-1] < losses["ours"][0]
    assert losses["ours"] == pytest.approx(losses["peft"], rel=1e-3)
