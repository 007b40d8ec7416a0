"""Our own layers, and models with them."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import layer_helpers
import torch
from adapter_helpers import EVERYTHING, make_zoo
from helpers import F32, F64

import lora_ext
from contract import bases
from contract.adapters import ADAPTERS, dropouts
from contract.subject import Kind, Subject
from lora_ext import LoraConfig, LoRALinear, apply_lora
from lora_ext.models import lora_state_dict
from lora_ext.nn import AdapterSpec, LoRAEmbedding, LoRALayer


class OurSubject(Subject):
    def x(self, rows=60, dtype=F32):
        if self.name == "net":
            return torch.randint(20, (rows, 5), generator=torch.Generator().manual_seed(1))
        if bases.is_there(self.name, is_pefts=False):
            return bases.make_x(self.name, dtype, rows)
        if self.name == "conv2d":
            pixels = layer_helpers.make_input("linear", dtype, (max(1, rows // 15), 3, 5))
            return pixels.movedim(-1, 1).contiguous()
        return layer_helpers.make_input(self.name, dtype, (rows,))

    def factors(self, name):
        tables = [t for m in self.layers for t in (m.lora_a, m.lora_b, m.lora_bias)]
        return [table[name] for table in tables if name in table]

    def trained(self):
        return [p for layer in self.layers for p in layer_helpers.adapter_parameters(layer)]

    def delta(self, name):
        return layer_helpers.delta(self.layer, name)

    def weight(self):
        return self.layer.base_operands()[0]

    def _do(self, verb: str, *arguments: Any) -> Any:
        """A layer's own method, or the model's function of `lora_ext`."""
        if isinstance(self.model, LoRALayer):
            return getattr(self.model, verb)(*arguments)
        of_model = {"merge": "merge_adapter", "unmerge": "unmerge_adapter"}
        return getattr(lora_ext, of_model.get(verb, verb))(self.model, *arguments)

    def set_adapter(self, names):
        self._do("set_adapter", names)

    def delete(self, name):
        self._do("delete_adapter", name)

    def merge(self, names=None):
        self._do("merge", names)

    def unmerge(self):
        self._do("unmerge")

    def pack(self):
        for layer in self.layers:
            if hasattr(layer, "pack_weight"):
                layer.pack_weight()

    def save(self, folder, name):
        lora_ext.save_adapter(self.model, folder, name)

    def load(self, folder, name):
        lora_ext.load_adapter(self.model, folder, name)

    def disabled(self):
        return self._do("disable_adapter")

    def _copy(self, dtype=None):
        """Of a quantised layer a dense one of the same numbers."""
        if self.name not in bases.QUANTISED:
            return copy.deepcopy(self.model).to(dtype)
        layer, dtype = self.layer, dtype or self.dtype
        made = LoRALinear.around(bases.dense(layer, self.name, self.dtype, layer.base_type, dtype))
        for name, spec in layer.adapters.items():
            made.add_adapter(name, spec, dtype if dtype == F64 else layer.lora_a[name].dtype)
        made.load_state_dict(lora_state_dict(self.model[0]), strict=False)
        made.set_adapter(layer.active_adapters)
        return torch.nn.Sequential(made)

    def in_float64(self):
        model = self._copy(F64)
        if self.name in bases.EXPERTS:
            model.experts._is_expert_parallel = True  # transformers' own forward, with W + s B A
            return model.eval()
        for layer in self.holding(model).layers:
            # The sum of weights would give no gradient to B at the padding index.
            is_embedding = isinstance(layer, LoRAEmbedding)
            formula = layer_helpers.in_peft_order if is_embedding else layer_helpers.exact
            layer.forward = partial(formula, layer)
        return model.eval()

    def in_peft_order(self):
        model = self._copy()
        base = self.layer.base_forward if self.name in bases.QUANTISED else None
        for layer in self.holding(model).layers:
            layer.forward = partial(layer_helpers.in_peft_order, layer, base=base)
        return model.eval()


class OurKind(Kind):
    name = "ours"
    layer_class = LoRALayer
    layers = ("net", "linear without bias", *layer_helpers.KINDS)
    merged_path = "merged"
    sharded = 0.0

    def has(self, layer, adapters):
        if bases.is_there(layer, is_pefts=False):
            return bases.has(layer, adapters, is_pefts=False)
        has_bias = layer not in ("embedding", "net")
        return (
            layer in self.layers
            and adapters != "dora"
            and ("lora_bias" not in adapters or has_bias)
        )

    def make(self, layer, adapters="one", dtype=F32, adapter_dtype=None, dropout=0.0):
        if layer == "net":
            targets = [*EVERYTHING, "head.0"]
            return self._applied(layer, make_zoo(dtype).train(), targets, adapters, dropout)
        if bases.is_there(layer, is_pefts=False):
            model, targets = bases.make(layer, dtype)
            if layer in bases.EXPERTS:
                dropout = dropouts(dropout, "a")  # they have one
            adapter_dtype = F64 if dtype == F64 else adapter_dtype
            subject = self._applied(layer, model, targets, adapters, dropout, adapter_dtype)
            subject.dtype = dtype
            return subject
        torch.manual_seed(1)
        specs = {
            name: AdapterSpec(
                words["r"],
                words["lora_alpha"],
                dropouts(dropout, name),
                words.get("use_rslora", False),
                lora_bias=words.get("lora_bias", False),
            )
            for name, words in ADAPTERS[adapters].items()
        }
        model = layer_helpers.make_layer(layer, specs, dtype, adapter_dtype)
        return OurSubject(self, layer, model)

    def _applied(self, layer, model, targets, adapters, dropout, adapter_dtype=None) -> OurSubject:
        for name, words in ADAPTERS[adapters].items():
            config = LoraConfig(
                targets,
                words["r"],
                words["lora_alpha"],
                lora_dropout=dropouts(dropout, name),
                use_rslora=words.get("use_rslora", False),
                lora_bias=words.get("lora_bias", False),
            )
            apply_lora(model, config, name, adapter_dtype=adapter_dtype)
        subject = OurSubject(self, layer, layer_helpers.randomize(model))
        subject.set_adapter(list(ADAPTERS[adapters]))
        return subject

    def mergeable(self, active):
        return [active, active[-1:], active[:1]]

    def has_blocks(self, layer, adapters):
        return bases.is_there(layer, is_pefts=False)

    def unmerged(self, dtype):
        return {"rtol": 0, "atol": 0}  # the weight was never written


OURS = OurKind()
