"""PEFT's layers with the forward that `lora_ext.accelerate` gives them."""

from __future__ import annotations

import warnings

import peft_helpers
import torch
from helpers import F32
from peft.tuners.lora import LoraLayer
from peft_helpers import HEIGHT, TARGETS, WIDTH, Net, exact_model, make_base, peft_model
from torch import nn

import lora_ext
from contract import bases
from contract.adapters import ADAPTERS, dropouts
from contract.subject import Kind, Subject


class Called(nn.Linear):
    """Not exactly nn.Linear: the base has to be called."""


class PeftSubject(Subject):
    def x(self, rows=60, dtype=F32):
        if self.name == "net":
            return peft_helpers.make_ids(rows)
        if bases.is_there(self.name, is_pefts=True):
            return bases.make_x(self.name, dtype, rows)
        return peft_helpers.make_x(self.name, dtype, rows)

    def factors(self, name):
        mine = {key: p for key, p in self.model.named_parameters() if name in key.split(".")}
        return [mine[key] for key in sorted(mine) if "lora_" in key]

    def trained(self):
        return [p for key, p in self.model.named_parameters() if "lora_" in key]

    def delta(self, name):
        return self.layer.get_delta_weight(name)

    def weight(self):
        return self.layer.base_layer.weight

    def set_adapter(self, names):
        self.model.base_model.set_adapter(names)

    def delete(self, name):
        self.model.delete_adapter(name)

    def merge(self, names=None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT says where all is merged already
            self.model.merge_adapter(names)

    def unmerge(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model.unmerge_adapter()

    def save(self, folder, name):
        self.model.save_pretrained(folder, selected_adapters=[name])
        for file in (folder / name).iterdir():
            file.rename(folder / file.name)

    def load(self, folder, name):
        self.model.load_adapter(folder, name, autocast_adapter_dtype=False)

    def disabled(self):
        return self.model.disable_adapter()

    def in_float64(self):
        if self.name not in bases.QUANTISED:
            return exact_model(self.model).eval()
        model = peft_helpers.plain_copy(self.model)
        layer = model.base_model.model[0]
        layer.base_layer = bases.dense(layer.base_layer, self.name, self.dtype)
        return model.double().eval()

    def in_peft_order(self):
        # In eval bitsandbytes quantises x, too.
        return peft_helpers.plain_copy(self.model).train(self.name in bases.QUANTISED)


class PeftKind(Kind):
    name = "peft"
    layer_class = LoraLayer
    layers = ("net", "linear", "linear without bias", "conv1d", "embedding", "subclass", "hooked")
    merged_path = "base"
    sharded = 1e-5

    def has(self, layer, adapters):
        if bases.is_there(layer, is_pefts=True):
            return bases.has(layer, adapters, is_pefts=True)
        if "lora_bias" in adapters and layer in ("embedding", "net"):
            return False  # PEFT has none on embeddings
        if adapters == "dora" and layer in ("subclass", "hooked"):
            return False  # PEFT's own forward
        return layer in self.layers

    def make(self, layer, adapters="one", dtype=F32, adapter_dtype=None, dropout=0.0):
        torch.manual_seed(1)
        base, targets = _base(layer, dtype)
        words = {
            name: {**one, "lora_dropout": dropouts(dropout, name)}
            for name, one in ADAPTERS[adapters].items()
        }
        of_experts = None
        if layer in bases.EXPERTS:
            # PEFT has no dropout there; `accelerate` has one for all adapters.
            of_experts = dropouts(dropout, "a")
            own = {"target_parameters": [t for t in targets if t.startswith("experts.")]}
            targets = [t for t in targets if not t.startswith("experts.")]
            words = {name: {**one, **own, "lora_dropout": 0.0} for name, one in words.items()}
        model = peft_model(base, words, targets, dtype)
        model = lora_ext.accelerate(model, expert_dropout=of_experts)
        subject = PeftSubject(self, layer, model)
        subject.dtype = dtype
        if layer == "hooked":
            subject.layer.base_layer.register_forward_hook(_unused_hook)
        if adapter_dtype is not None:
            for parameter in subject.trained():
                parameter.data = parameter.data.to(adapter_dtype)
        return subject

    def mergeable(self, active):
        return [active]  # PEFT's merged layer computes its base alone

    def has_blocks(self, layer, adapters):
        is_base = bases.is_there(layer, is_pefts=True)
        return adapters == "dora" or is_base or layer in ("embedding", "net")

    def unmerged(self, dtype):
        tolerance = 1e-10 if dtype == torch.float64 else 1e-5
        return {"rtol": tolerance, "atol": tolerance}  # what was added is subtracted


def _base(layer: str, dtype: torch.dtype) -> tuple[nn.Module, list[str]]:
    """The model and the paths of what gets adapters."""
    if bases.is_there(layer, is_pefts=True):
        return bases.make(layer, dtype)
    if layer == "net":
        return Net(), TARGETS
    if layer == "subclass":
        return nn.Sequential(Called(WIDTH, HEIGHT)), ["0"]
    return nn.Sequential(make_base("linear" if layer == "hooked" else layer)), ["0"]


def _unused_hook(*_: object) -> None:
    """Its being there is what counts."""


PEFT = PeftKind()
