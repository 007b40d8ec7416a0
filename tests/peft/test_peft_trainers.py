"""Accelerated models in others' training loops: transformers' Trainer, and TRL's SFTTrainer.

The loops are the real ones, on small models of random weights. Without dropout PEFT's own model has
the same losses; with dropout the fused op is still what runs.
"""

import copy
import importlib.util
import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_helpers import paths, tiny_llama
from torch.utils.data import Dataset

import lora_ext

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # transformers' Trainer needs it

VOCAB, LENGTH = 64, 24


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("transformers", "trl", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


def of_trl(test):
    without = importlib.util.find_spec("trl") is None
    return pytest.mark.nightly(pytest.mark.skipif(without, reason="trl is not installed")(test))


def llama():
    return tiny_llama(vocab_size=VOCAB, bos_token_id=0, eos_token_id=1, pad_token_id=2)


def gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(**sizes, **no_dropout)
    return transformers.GPT2LMHeadModel(config)


MODELS = {
    "llama": (llama, ["q_proj", "v_proj", "down_proj", "embed_tokens"]),
    "gpt2": (gpt2, ["c_attn", "mlp.c_proj"]),
}


def adapted(name, dropout=0.0):
    make, targets = MODELS[name]
    torch.manual_seed(1)
    words = {"r": 4, "lora_alpha": 16, "lora_dropout": dropout, "task_type": "CAUSAL_LM"}
    return get_peft_model(make(), LoraConfig(target_modules=targets, **words))


class Texts(Dataset):
    """Random token ids with themselves as labels."""

    def __len__(self):
        return 32

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, VOCAB, (LENGTH,), generator=generator)
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def arguments(folder, **words):
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 3,
        "report_to": [],
        "use_cpu": True,
        "seed": 5,
        "disable_tqdm": True,
    }
    return {**defaults, **words}


def train(model, folder, resume=None, **words):
    options = transformers.TrainingArguments(**arguments(folder, **words))
    trainer = transformers.Trainer(model, options, train_dataset=Texts())
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("words", [{}, {"gradient_checkpointing": True}, {"bf16": True}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_trainer(tmp_path, name, words):
    """PEFT's losses; a checkpoint of one is loaded by the other; training resumes from it."""
    model = adapted(name)
    fast = lora_ext.accelerate(copy.deepcopy(model))
    losses = train(fast, tmp_path / "ours", **words)
    wanted = train(model, tmp_path / "peft", **words)
    assert losses == pytest.approx(wanted, rel=2e-2 if words.get("bf16") else 1e-4)
    assert len(set(losses)) == len(losses)
    assert set(paths(fast).values()) <= {"fused", "library", "added"}
    checkpoint = tmp_path / "ours" / "checkpoint-3"
    resumed = lora_ext.accelerate(adapted(name))
    again = train(resumed, tmp_path / "resumed", resume=str(checkpoint), **words)
    assert again[-1] == pytest.approx(losses[-1], rel=1e-3)
    loaded = PeftModel.from_pretrained(MODELS[name][0](), tmp_path / "ours" / "checkpoint-6")
    ids = Texts()[0]["input_ids"][None]
    with torch.no_grad():
        logits = loaded(ids).logits
        # Trainer leaves autocast in the forward of the model that it trained.
        tolerance = 2e-2 if words.get("bf16") else 1e-3
        own = fast.eval()(ids).logits
        torch.testing.assert_close(logits, own, rtol=tolerance, atol=tolerance)


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"word{i}": i for i in range(3, VOCAB)} | {"<s>": 0, "</s>": 1, "<pad>": 2}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def text(first, count):
    return " ".join(f"word{3 + (first + i) % (VOCAB - 3)}" for i in range(count))


@of_trl
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_sft(tmp_path, dropout):
    """TRL's SFTTrainer, which wraps the model itself: accelerate what it has made."""
    import datasets
    import trl

    texts = [text(7 * i, 12) for i in range(32)]
    losses = {}
    for way in ("ours", "peft"):
        torch.manual_seed(1)
        options = arguments(tmp_path / way, save_strategy="no", max_length=32, bf16=False)
        trainer = trl.SFTTrainer(
            llama(),
            trl.SFTConfig(**options),
            train_dataset=datasets.Dataset.from_dict({"text": texts}),
            processing_class=word_tokenizer(),
            peft_config=LoraConfig(
                r=4, lora_alpha=16, lora_dropout=dropout, target_modules="all-linear"
            ),
        )
        if way == "ours":
            lora_ext.accelerate(trainer.model)
            assert set(paths(trainer.model).values()) == {"fused"}
        trainer.train()
        losses[way] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses["ours"][-1] < losses["ours"][0]
    assert losses["ours"] == pytest.approx(losses["peft"], rel=1e-4 if dropout == 0.0 else 5e-2)


def of_preferences(**words):
    import datasets
    import trl

    rows = [
        {"prompt": text(7 * i, 4), "chosen": text(7 * i + 4, 6), "rejected": text(5 * i, 6)}
        for i in range(32)
    ]
    return trl.DPOTrainer(
        llama(),
        args=trl.DPOConfig(**words, max_length=32),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=word_tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"),
    )


def of_rewards(**words):
    import datasets
    import trl

    def odd(completions, **_):
        """The part of a completion's words that have odd numbers."""
        words = [completion.split() for completion in completions]
        return [sum(int(w[-1]) % 2 for w in some if w[-1].isdigit()) / 6 for some in words]

    options = trl.GRPOConfig(**words, num_generations=4, max_completion_length=6, beta=0.1)
    return trl.GRPOTrainer(
        llama(),
        reward_funcs=odd,
        args=options,
        train_dataset=datasets.Dataset.from_list([{"prompt": text(7 * i, 4)} for i in range(32)]),
        processing_class=word_tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"),
    )


@of_trl
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("make", [of_preferences, of_rewards])
def test_policy_and_reference(tmp_path, make, checkpointing):
    """TRL's DPO and GRPO, whose references are the model without its adapters: PEFT's numbers, and
    training resumes from a checkpoint with the same bits."""
    logs, trained = {}, {}
    for way in ("ours", "peft", "resumed"):
        torch.manual_seed(1)
        words = {"optim": "sgd", "learning_rate": 5.0, "gradient_checkpointing": checkpointing}
        trainer = make(**arguments(tmp_path / way, bf16=False, **words))
        if way != "peft":
            lora_ext.accelerate(trainer.model)
            assert set(paths(trainer.model).values()) == {"fused"}
        parameters = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
        before = {name: p.detach().clone() for name, p in parameters.items()}
        half_way = str(tmp_path / "ours" / "checkpoint-3") if way == "resumed" else None
        trainer.train(resume_from_checkpoint=half_way)
        logs[way] = [entry for entry in trainer.state.log_history if "loss" in entry]
        trained[way] = {name: p.detach().clone() for name, p in parameters.items()}
        moved = [name for name, p in trained[way].items() if (p - before[name]).abs().max() > 1e-3]
        assert len(moved) > len(before) / 2
    for key in ("loss", "grad_norm", "reward", "kl", "rewards/margins", "completions/mean_length"):
        ours, wanted = ([entry.get(key, 0.0) for entry in logs[way]] for way in ("ours", "peft"))
        assert ours == pytest.approx(wanted, rel=1e-3, abs=1e-5), key
    assert any("reward" in key for key in logs["ours"][0])
    torch.testing.assert_close(trained["ours"], trained["peft"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(trained["resumed"], trained["ours"], rtol=0, atol=0)
