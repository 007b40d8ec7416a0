"""Adapters of models of transformers, from PEFT's folders and back."""

import copy

import pytest
import torch
from adapter_helpers import (
    assert_unchanged,
    from_peft,
    make_ids,
    peft_model,
    read_config,
    save_peft,
    state_of,
    write_config,
)
from peft_helpers import tiny_llama

from lora_ext.adapters import AdapterError, load_adapter, read_adapter_config, save_adapter


def language_model(**words):
    return tiny_llama(vocab_size=32, **words).double().eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=make_ids()).logits


def goes_back(base, config, folder, task_type):
    """An adapter of PEFT's, loaded here and saved again, is PEFT's."""
    theirs = peft_model(base, **config)
    save_peft(theirs, folder / "theirs")
    ours = load_adapter(copy.deepcopy(base), folder / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-11, atol=1e-11)
    save_adapter(ours, folder / "ours", task_type=task_type)
    torch.testing.assert_close(logits(from_peft(base, folder / "ours")), logits(theirs))


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "all-linear", "task_type": "CAUSAL_LM"},
        {"target_modules": None},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 1},
        {"target_modules": ["v_proj", "embed_tokens"]},  # PEFT stores the embedding's weight too
        {"target_modules": ["v_proj", "lm_head"], "modules_to_save": ["embed_tokens"]},
        {
            "target_modules": r"\b(?:.*?(?:self_attn).*?(?:q_proj|o_proj).*?)|"
            r"(?:\bmodel\.layers\.[\d]{1,}\.mlp\.(?:gate_proj))"
        },
    ],
    ids=lambda config: str(config["target_modules"])[:20],
)
def test_a_language_model(config, tmp_path):
    goes_back(language_model(tie_word_embeddings=False), config, tmp_path, "CAUSAL_LM")


def test_all_linear_written_by_hand(tmp_path):
    """PEFT itself stores the names that it stands for."""
    base = language_model()
    theirs = peft_model(base, target_modules="all-linear", task_type="CAUSAL_LM")
    save_peft(theirs, tmp_path)
    write_config(tmp_path, {**read_config(tmp_path), "target_modules": "all-linear"})
    ours = load_adapter(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-11, atol=1e-11)
    assert not hasattr(ours.lm_head, "adapters")


def test_a_classifier(tmp_path):
    """PEFT adds "classifier" and "score" to modules_to_save, of which the model has one."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=32, intermediate_size=24, num_labels=3, **sizes)
    base = BertForSequenceClassification(config).double().eval()
    config = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    goes_back(base, config, tmp_path, "SEQ_CLS")
    assert read_adapter_config(tmp_path / "theirs").modules_to_save == ("classifier", "score")
    assert read_config(tmp_path / "ours")["modules_to_save"] == ["classifier"]


def test_an_adapter_for_another_embedding_is_refused(tmp_path):
    """PEFT stores the embedding that it targets, and on loading overwrites the model's."""
    base = language_model()
    save_peft(peft_model(base, target_modules=["v_proj", "embed_tokens"]), tmp_path)
    with torch.no_grad():
        base.model.embed_tokens.weight[3] += 1
    before = state_of(base)
    with pytest.raises(AdapterError, match=r"embed_tokens.*expected the model's own weight"):
        load_adapter(base, tmp_path)
    assert_unchanged(base, before)
