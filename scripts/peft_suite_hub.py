"""Makes a hub for PEFT's own tests: tiny models with random weights under the names they load.

    python scripts/peft_suite_hub.py FOLDER     # a minute; FOLDER is what HF_HOME then names

PEFT's tests load models from the Hugging Face hub by name. Each name has an entry below that says
of which class and size a model of that name is made; it is written, with a tokenizer of single
bytes, where huggingface_hub looks for a model that it has downloaded. With `HF_HOME=FOLDER` and
`HF_HUB_OFFLINE=1` the tests then run without a network. Nothing is downloaded, so that a test
which compares with outputs of the real weights fails. Only what a LoRA case loads is here.
"""

from __future__ import annotations

import hashlib
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import tokenizers
import torch
import transformers

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = len(SPECIAL) + len(BYTES)

TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Sizes, by the names that most configurations have for them; families with other names follow.
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
PLAIN = {**TEXT, **SIZES}
GROUPED = {**PLAIN, "num_key_value_heads": 2}
EXPERTS = {**GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
OPT = {
    **TEXT,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
GPT2 = {**TEXT, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 512}
BLOOM = {**TEXT, "hidden_size": 32, "n_layer": 5, "n_head": 4}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 5,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
GATED_T5 = {**T5, "feed_forward_proj": "gated-gelu"}
BART = {
    **TEXT,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 512,
    "decoder_start_token_id": 2,
}
WHISPER = {**BART, "num_mel_bins": 80, "max_source_positions": 60, "max_target_positions": 60}
CLIP_TEXT = {**TEXT, **SIZES, "max_position_embeddings": 77, "projection_dim": 32}
VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4}
VISION["out_hidden_size"] = 32
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3}
GEMMA = {**GROUPED, "head_dim": 8, "sliding_window": 64}
MAMBA = {**TEXT, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
LLAMA4 = {**EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": 64}
QWEN_EXPERTS = {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 16}
NEMOTRON = {
    **GROUPED,
    "layers_block_type": ["linear_attention", "full_attention"],
    **{"head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 8},
    **{"n_groups": 2, "ssm_state_size": 8},
}


class Model(NamedTuple):
    """A model of transformers: its class, its configuration, and the revisions that it has."""

    class_name: str
    values: dict[str, Any]
    revisions: tuple[str, ...] = ("main",)


class Adapter(NamedTuple):
    """A LoRA adapter for one of the models, and the class of transformers that loads the model."""

    class_name: str
    base: str
    task_type: str | None
    target_modules: tuple[str, ...] | None = None
    revision: str = "main"
    subfolder: str = ""


HF, PEFT, TRL = (f"{owner}-internal-testing/" for owner in ("hf", "peft", "trl"))
TINY = f"{PEFT}tiny-random-"
# Whose names end with their class, and the others.
OF_CLASS = {
    "BartForConditionalGeneration": BART,
    "BertForSequenceClassification": PLAIN,
    "BloomForCausalLM": BLOOM,
    "DebertaModel": PLAIN,
    "DebertaV2Model": PLAIN,
    "GPT2LMHeadModel": GPT2,
    "GPTJForCausalLM": {**GPT2, "rotary_dim": 4},
    "GPTNeoXForCausalLM": PLAIN,
    "LlamaForCausalLM": GROUPED,
    "OPTForCausalLM": OPT,
    "ResNetForImageClassification": RESNET,
    "RobertaForSequenceClassification": PLAIN,
    "RobertaModel": PLAIN,
    "T5ForConditionalGeneration": T5,
}
MODELS = {
    **{f"{TINY}{name}": Model(name, values) for name, values in OF_CLASS.items()},
    "Qwen/Qwen2-0.5B": Model("Qwen2ForCausalLM", {**GROUPED, "vocab_size": VOCABULARY + 20}),
    "google/flan-t5-small": Model("T5ForConditionalGeneration", GATED_T5),
    "gpt2": Model("GPT2LMHeadModel", GPT2),
    f"{HF}Mixtral-tiny": Model("MixtralForCausalLM", EXPERTS),
    f"{HF}tiny-random-BertModel": Model("BertForPreTraining", PLAIN),
    f"{HF}tiny-random-Gemma3ForCausalLM": Model("Gemma3ForCausalLM", GEMMA),
    f"{HF}tiny-random-LlamaForCausalLM": Model("LlamaForCausalLM", GROUPED),
    f"{HF}tiny-random-MistralForCausalLM": Model("MistralForCausalLM", GROUPED),
    f"{HF}tiny-random-WhisperForConditionalGeneration": Model(
        "WhisperForConditionalGeneration", WHISPER
    ),
    f"{HF}tiny-random-gpt2": Model("GPT2LMHeadModel", GPT2),
    f"{PEFT}opt-125m": Model("OPTForCausalLM", {**OPT, "num_hidden_layers": 12}),
    f"{PEFT}tiny-clip-text-2": Model("CLIPTextModelWithProjection", CLIP_TEXT),
    f"{PEFT}tiny-dummy-qwen2": Model("Qwen2ForCausalLM", GROUPED),
    f"{TINY}BertModel": Model("BertForPreTraining", PLAIN, ("main", "v2.0.0")),
    f"{TINY}T5ForConditionalGeneration-calibrated": Model("T5ForConditionalGeneration", T5),
    f"{TINY}gpt2": Model("GPT2LMHeadModel", GPT2),
    f"{TINY}t5": Model("T5ForConditionalGeneration", T5),
    "tiiuae/falcon-mamba-tiny-dev": Model("FalconMambaForCausalLM", MAMBA),
    f"{TRL}tiny-GptOssForCausalLM": Model("GptOssForCausalLM", EXPERTS),
    f"{TRL}tiny-Llama4ForCausalLM": Model("Llama4ForCausalLM", LLAMA4),
    f"{TRL}tiny-LlamaForSequenceClassification-3.2": Model(
        "LlamaForSequenceClassification", GROUPED
    ),
    f"{TRL}tiny-NemotronHForCausalLM-nano": Model("NemotronHForCausalLM", NEMOTRON),
    f"{TRL}tiny-Qwen2_5_VLForConditionalGeneration": Model(
        "Qwen2_5_VLForConditionalGeneration", {"text_config": GROUPED, "vision_config": VISION}
    ),
    f"{TRL}tiny-Qwen3MoeForCausalLM": Model("Qwen3MoeForCausalLM", QWEN_EXPERTS),
    f"{TRL}tiny-random-LlamaForCausalLM": Model("LlamaForCausalLM", PLAIN),
}

TINY_OPT = f"{TINY}OPTForCausalLM"
CAUSAL = "AutoModelForCausalLM"
WHISPER_NAME = f"{HF}tiny-random-WhisperForConditionalGeneration"
ADAPTERS = {
    f"{PEFT}opt-125m-dummy-lora": Adapter(CAUSAL, f"{PEFT}opt-125m", "CAUSAL_LM"),
    f"{PEFT}test-lora-subfolder": Adapter(CAUSAL, TINY_OPT, "CAUSAL_LM", subfolder="test"),
    f"{PEFT}tiny-OPTForCausalLM-lora": Adapter(CAUSAL, TINY_OPT, "CAUSAL_LM"),
    f"{TINY}BertModel-lora": Adapter(
        CAUSAL, f"{HF}tiny-random-BertModel", "CAUSAL_LM", revision="v1.2.3"
    ),
    f"{PEFT}tiny_GPT2ForTokenClassification-lora": Adapter(
        "AutoModelForTokenClassification", f"{HF}tiny-random-gpt2", "TOKEN_CLS"
    ),
    f"{PEFT}tiny_OPTForFeatureExtraction-lora": Adapter(
        "AutoModel", TINY_OPT, "FEATURE_EXTRACTION"
    ),
    f"{PEFT}tiny_OPTForQuestionAnswering-lora": Adapter(
        "AutoModelForQuestionAnswering", TINY_OPT, "QUESTION_ANS"
    ),
    f"{PEFT}tiny_OPTForSequenceClassification-lora": Adapter(
        "AutoModelForSequenceClassification", TINY_OPT, "SEQ_CLS"
    ),
    f"{PEFT}tiny_T5ForSeq2SeqLM-lora": Adapter(
        "AutoModelForSeq2SeqLM", f"{TINY}t5", "SEQ_2_SEQ_LM"
    ),
    f"{PEFT}tiny_WhisperForConditionalGeneration-lora": Adapter(
        "WhisperForConditionalGeneration", WHISPER_NAME, None, ("q_proj", "v_proj")
    ),
}


def snapshot(home: Path, name: str, revision: str = "main") -> Path:
    """The folder in which huggingface_hub looks for a revision of a repository."""
    commit = hashlib.sha1(f"{name} {revision}".encode()).hexdigest()
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True, exist_ok=True)
    reference = repository / "refs" / revision
    reference.parent.mkdir(exist_ok=True)
    reference.write_text(commit)
    return folder


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer with a token for each byte, the special ones first."""
    vocabulary = {token: number for number, token in enumerate(SPECIAL + BYTES)}
    bytewise = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>")
    )
    bytewise.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = tokenizers.decoders.ByteLevel()
    pad, bos, eos, unk = SPECIAL
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytewise,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        model_max_length=512,
    )


def make_model(home: Path, name: str) -> None:
    model = MODELS[name]
    kind = getattr(transformers, model.class_name)
    for revision in model.revisions:
        folder = snapshot(home, name, revision)
        kind(kind.config_class(**model.values)).save_pretrained(folder)
        if "ImageClassification" in model.class_name:
            size = {"shortest_edge": 32}
            transformers.ConvNextImageProcessor(size=size).save_pretrained(folder)
        else:
            tokenizer().save_pretrained(folder)


def make_adapter(home: Path, name: str) -> None:
    """Writes an adapter for a model that has been made, under the name of that model."""
    adapter = ADAPTERS[name]
    folder = snapshot(home, name, adapter.revision)
    kind = getattr(transformers, adapter.class_name)
    base = kind.from_pretrained(snapshot(home, adapter.base))
    base.name_or_path = adapter.base
    base.config._name_or_path = adapter.base
    config = peft.LoraConfig(
        task_type=adapter.task_type, target_modules=adapter.target_modules, init_lora_weights=False
    )
    peft.get_peft_model(base, config).save_pretrained(folder / adapter.subfolder)


def make_stable_diffusion(home: Path, name: str) -> None:
    import diffusers

    words = {token: number for number, token in enumerate(SPECIAL)}
    for end in ("", "</w>"):
        words |= {byte + end: len(words) + number for number, byte in enumerate(BYTES)}
    words |= {"<|startoftext|>": len(words), "<|endoftext|>": len(words) + 1}
    text = {**CLIP_TEXT, "vocab_size": len(words), "eos_token_id": len(words) - 1}
    folder = snapshot(home, name)
    diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=[32, 32],
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            latent_channels=4,
            sample_size=32,
        ),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**text)),
        tokenizer=transformers.CLIPTokenizer(vocab=words, merges=[], model_max_length=77),
        unet=diffusers.UNet2DConditionModel(
            block_out_channels=(32, 32),
            layers_per_block=1,
            sample_size=16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=8,
        ),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def make_flux(home: Path, name: str) -> None:
    import diffusers

    diffusers.Flux2Transformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    ).save_pretrained(snapshot(home, name) / "transformer")


PIPELINES: dict[str, Callable[[Path, str], None]] = {
    "hf-internal-testing/tiny-sd-pipe": make_stable_diffusion,
    "hf-internal-testing/tiny-flux2": make_flux,
}


def write_data(home: Path, name: str, split: str, features: Any, rows: Sequence[Any]) -> None:
    """A data set with one split where `datasets` keeps what it has prepared."""
    import datasets

    owner, short = name.split("/")
    folder = home / "datasets" / f"{owner}___{short}" / "default" / "0.0.0" / ("0" * 40)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{short}-{split}.arrow"
    with datasets.arrow_writer.ArrowWriter(path=str(path), features=features) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()
    splits = datasets.SplitDict()
    splits.add(datasets.SplitInfo(split, num_examples=len(rows), dataset_name=short))
    datasets.DatasetInfo(
        features=features, splits=splits, config_name="default", dataset_name=short, version="0.0.0"
    ).write_to_directory(str(folder))


def make_pictures(home: Path, name: str) -> None:
    """A data set of one picture of noise."""
    import datasets

    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image()})
    write_data(home, name, "test", features, [features.encode_example({"image": pixels})])


DATA_SETS = {"huggingface/cats-image": make_pictures}


def make(home: Path) -> None:
    """Makes every model, then the adapters for them, the pipelines and the data sets."""
    for table in (
        dict.fromkeys(MODELS, make_model),
        dict.fromkeys(ADAPTERS, make_adapter),
        PIPELINES,
        DATA_SETS,
    ):
        for name, maker in table.items():
            torch.manual_seed(zlib.crc32(name.encode()))
            maker(home, name)


if __name__ == "__main__":
    make(Path(sys.argv[1]).resolve())
