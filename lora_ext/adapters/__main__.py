"""`python -m lora_ext.adapters convert FROM TO --layout LAYOUT`: a folder in another layout."""

from __future__ import annotations

import argparse

import torch

from .errors import AdapterError
from .folder import open_adapter
from .layouts import LAYOUTS
from .load import load_adapter, read_adapter_config
from .save import save_adapter
from .tensors import open_tensors

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def convert(source: str, target: str, layout: str, base: str | None = None) -> None:
    """Writes the adapter of a folder in a layout, in its dtype if all tensors have the same.

    The base's config.json says what the model is; its weights are not read.

    Args:
        source: a folder that `load_adapter` reads.
        target: a folder; made if it does not exist.
        layout: as in `save_adapter`.
        base: a local path, or a name on the Hugging Face hub; None is that in the adapter's config.

    Raises:
        AdapterError: as `load_adapter` and `save_adapter`; or the adapter needs the base's weights.
    """
    import transformers

    config = read_adapter_config(source)
    base = base or config.base_model_name_or_path
    if base is None or config.init_lora_weights is not True:
        init = f"init_lora_weights true, but got {config.init_lora_weights!r}"
        expected = "the name of the base, --base, but got none" if base is None else init
        raise AdapterError(
            f"lora_ext.adapters convert: {source}: expected {expected}; or load_adapter it "
            "into the model with its weights, then save_adapter(layout=...)"
        )
    with open_adapter(source) as files, open_tensors(files.weights) as file:
        dtypes = {entry.dtype for entry in file.entries.values()}
    of_base = transformers.AutoConfig.from_pretrained(base, revision=config.revision)
    kind = getattr(transformers, (of_base.architectures or ["_"])[0], None)
    make = transformers.AutoModelForCausalLM.from_config if kind is None else kind._from_config
    with torch.device("meta"):
        model = make(of_base)
    model.to_empty(device="cpu")  # addresses alone: memory that is not written is not taken
    model.tie_weights()
    dtype = _DTYPES.get(dtypes.pop()) if len(dtypes) == 1 else None
    load_adapter(model, source, adapter_dtype=dtype)
    save_adapter(
        model,
        target,
        base_model_name_or_path=config.base_model_name_or_path or base,
        revision=config.revision,
        task_type=config.task_type,
        layout=layout,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m lora_ext.adapters", description=__doc__)
    add = parser.add_subparsers(required=True).add_parser("convert").add_argument
    add("source", metavar="FROM")
    add("target", metavar="TO")
    add("--layout", choices=LAYOUTS, required=True)
    add("--base", help="path or name of the base model, if adapter_config.json names another")
    convert(**vars(parser.parse_args()))
