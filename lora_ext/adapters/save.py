"""Saving an adapter in PEFT's folder format."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..models.model import check_not_peft, reshard
from ..nn.adapter_spec import DEFAULT_ADAPTER
from ..torch_state import is_sharded
from .content import Content
from .errors import AdapterError, shown, telling
from .folder import NEW_WEIGHTS, replace_adapter
from .layout import inner_model
from .layouts import LAYOUTS, check_written, laid_out
from .peft_config import AdapterConfig, render_config
from .tensors import encode

_TASK_TYPES = (
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str = DEFAULT_ADAPTER,
    *,
    bias: str | None = None,
    base_model_name_or_path: str | None = None,
    revision: str | None = None,
    task_type: str | None = None,
    layout: str = "peft",
) -> None:
    """Writes an adapter to a folder in the format of PEFT 0.21.2, for PEFT and `load_adapter`.

    It writes ``adapter_config.json``, ``adapter_model.safetensors`` and, if there is none, a
    ``README.md``; other files are not touched. If the process is killed at any moment, the folder
    has the previous adapter or the new one (`docs/adapters.md`). The config is derived from the
    layers: the most common rank and alpha, and patterns for the rest. An adapter that is not plain
    LoRA is written as a plain one with the same product: PiSSA and OLoRA with rank 2 r, merged
    projections with one dense pair.

    Engines may want experts in another layout (`docs/to-a-server.md`). The file is put in place if
    its readers make the model's W + scaling B A of it. "peft" after experts in 4 bits has PEFT's
    order of such; ``python -m lora_ext.adapters convert`` writes that of dense ones.

    With parameters sharded by FSDP2 every rank calls it; rank 0 writes. Else one process calls it.

    Args:
        model: holds the adapter.
        folder: a local path; made if it does not exist.
        adapter_name: which one.
        bias: which biases of the base to store: "none", "all" or "lora_only"; None stores those
            that are trained or came with the adapter.
        base_model_name_or_path, revision, task_type: information for the config.
        layout: of experts: "peft", stacks as in the model; "per-expert", a linear layer for each
            expert's projection; "stacked", w1, w3, w2: gate, up, down of all experts ``[E, ...]``.

    Raises:
        AdapterError: a ValueError. The model has no such adapter, the layout cannot express it,
            a value is not finite, another save to the folder is under way, or a file is a link.
        OSError: the folder cannot be written, or the disk is full.

    In both cases the folder is unchanged.
    """
    folder = os.fspath(folder)
    inner = inner_model(model)
    check_not_peft(inner, "save_adapter")
    reshard(inner)
    with telling(f"lora_ext.save_adapter: {folder}: "):
        if layout not in LAYOUTS:
            raise AdapterError(f"expected layout to be one of {LAYOUTS}, but got {layout!r}")
        information = {
            "base_model_name_or_path": base_model_name_or_path,
            "revision": revision,
            "task_type": task_type,
        }
        for name, value in information.items():
            if value is not None and not (isinstance(value, str) and value.isprintable()):
                raise AdapterError(f"expected {name} to be a printable string, but got {value!r}")
        if task_type not in (None, *_TASK_TYPES):
            raise AdapterError(f"expected task_type in {_TASK_TYPES}, but got {shown(task_type)}")
        content = Content(inner, adapter_name, bias)
        config = content.config(information)
        whole, is_collective = _whole(content.tensors())

        def write() -> None:
            laid, tensors = laid_out(layout, content, config, whole)
            data = render_config(laid, content.has_conv1d)

            def weights() -> Iterator[bytes]:
                yield encode(tensors)
                check_written(os.path.join(folder, NEW_WEIGHTS), data, layout, content, whole)

            replace_adapter(folder, data, weights, _card(laid))

        _on_first_rank(write) if is_collective else write()


def _whole(
    tensors: Iterable[tuple[str, Tensor, tuple[int, ...]]],
) -> tuple[dict[str, Tensor], bool]:
    """The tensors on the CPU, on rank 0 if some are sharded, and whether some are sharded.

    Every rank takes part in gathering them and gets the same values, so all raise the same errors.
    """
    whole: dict[str, Tensor] = {}
    is_collective = False
    for key, tensor, shape in tensors:
        tensor = tensor.detach()
        if is_sharded(tensor):
            is_collective = True
            tensor = tensor.full_tensor()  # type: ignore[attr-defined]  # DTensor's
        if tensor.is_meta:
            raise AdapterError(
                f"{key}: expected a tensor with values to store, but got one on the meta device"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise AdapterError(f"{key}: expected finite values, but got NaN or infinity")
        if not is_collective or dist.get_rank() == 0:
            whole[key] = tensor.reshape(shape).cpu().contiguous()
    return whole, is_collective


def _on_first_rank(write: Callable[[], None]) -> None:
    """Calls it on rank 0; all raise if it fails."""
    failure: list[str | None] = [None]
    try:
        if dist.get_rank() == 0:
            write()
    except BaseException as error:
        failure[0] = f"{type(error).__name__}: {error}"
        raise
    finally:
        dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise AdapterError(f"rank 0 could not write: {failure[0]}")


def _card(config: AdapterConfig) -> bytes:
    """A model card with the metadata that the Hugging Face hub reads."""
    base = config.base_model_name_or_path
    base_line = "" if base is None else f"base_model: {json.dumps(base)}\n"
    return f"""---
{base_line}library_name: peft
tags:
- lora
---

# LoRA adapter

Rank {config.r}, alpha {config.lora_alpha:g}; see `adapter_config.json`. Load it with
`lora_ext.load_adapter` or, in PEFT's layout, `peft.PeftModel.from_pretrained`.
""".encode()
