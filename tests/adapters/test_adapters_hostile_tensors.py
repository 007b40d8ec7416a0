"""A well-formed adapter_model.safetensors of wrong names, shapes, dtypes or values."""

import pytest
import torch
from adapter_helpers import WEIGHTS, read_tensors
from hostile_helpers import Q0, A, B, assert_refused
from safetensors.torch import save_file

pytestmark = pytest.mark.usefixtures("no_hang")


def edit_tensors(folder, edit):
    tensors = read_tensors(folder)
    edit(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / WEIGHTS)


def put(key, value):
    return lambda tensors: tensors.__setitem__(key, value)


def change(key, function):
    return lambda tensors: tensors.__setitem__(key, function(tensors[key]))


def rename(old, new):
    return lambda tensors: tensors.__setitem__(new, tensors.pop(old))


def rename_all(function):
    def edit(tensors):
        for key in list(tensors):
            tensors[function(key)] = tensors.pop(key)

    return edit


def fill(value, place=(0, 0)):
    def function(tensor):
        tensor = tensor.clone()
        tensor[place] = value
        return tensor

    return function


NORM = "base_model.model.norm.weight"
BAD_TENSORS = {
    # keys
    "no lora_B": (lambda t: t.pop(B), r"q_proj.lora_B.weight' is missing"),
    "no lora_A": (lambda t: t.pop(A), r"q_proj.lora_A.weight' is missing"),
    "no bias": (lambda t: t.pop(Q0 + "base_layer.bias"), "base_layer.bias' is missing"),
    "no norm": (lambda t: t.pop(NORM), "norm.weight' is missing"),
    "nothing": (lambda t: t.clear(), "expected tensors such as 'base_model.*none matches; got no"),
    "one more": (put("base_model.model.extra", torch.ones(1)), "LoRA tensors alone.*model.extra'"),
    "one of no module": (
        put("base_model.model.layers.9.q_proj.lora_A.weight", torch.ones(2, 16)),
        "LoRA tensors alone, but got 'base_model.model.layers.9",
    ),
    "one of another module": (
        put("base_model.model.c_attn.lora_A.weight", torch.ones(2, 16)),
        r"c_attn.base_layer.bias', 'base_model.model.c_attn.lora_B.weight' is missing",
    ),
    "one of a module of no use": (
        put("base_model.model.norm.lora_A.weight", torch.ones(2, 10)),
        r"at 'norm', but the adapter is for a torch.nn.modules.normalization.LayerNorm",
    ),
    "DoRA": (put(Q0 + "lora_magnitude_vector", torch.ones(16)), "magnitude_vector': DoRA"),
    "lora_bias": (put(Q0 + "lora_B.bias", torch.ones(16)), "lora_B.bias', of a"),
    "no key matches": (
        rename_all(lambda key: key.replace("base_model.model.", "transformer.")),
        "expected tensors such as 'base_model.model.* but none matches; got 'transformer",
    ),
    "no prefix": (rename_all(lambda key: key.split(".", 2)[2]), "none matches; got 'layers"),
    "lower case": (rename(A, A.replace("lora_A", "lora_a")), r"A.weight' is missing; there are"),
    "two cases": (put(A.replace("q_proj", "Q_proj"), torch.ones(2, 16)), "got .*layers.0.Q_proj"),
    "two spellings": (
        put(A.replace("lora_A", "lora_a"), torch.ones(2, 16)),
        "lora_a.weight', of a",
    ),
    "with an adapter's name": (
        rename(A, Q0 + "lora_A.default.weight"),
        "lora_A.weight' is missing",
    ),
    "an empty component": (
        rename(A, A.replace("layers.0", "layers..0")),
        "lora_A.weight' is missing",
    ),
    "a leading dot": (put(f".{A}", torch.ones(2, 16)), "LoRA tensors alone"),
    "traversal": (
        put("base_model.model.../../x.lora_A.weight", torch.ones(2, 16)),
        "LoRA tensors alone",
    ),
    "an embedding's key": (rename(A, Q0 + "lora_embedding_A"), "lora_A.weight' is missing"),
    "an empty name": (put("", torch.ones(1)), "LoRA tensors alone, but got ''"),
    # shapes
    "rank": (change(A, lambda a: a.repeat(2, 1)), r"\[2, 16\] \(rank 2 by .*but got \[4, 16\]"),
    "rank of B": (change(B, lambda b: b[:, :1]), r"lora_B.weight': expected shape \[16, 2\]"),
    "both ranks": (
        lambda t: (change(A, lambda a: a[:1])(t), change(B, lambda b: b[:, :1])(t)),
        r"rank 2 by the config",
    ),
    "transposed": (change(A, lambda a: a.t()), r"expected shape \[2, 16\].*but got \[16, 2\]"),
    "in features": (change(A, lambda a: a[:, :15]), r"16 in and 16 out .*got \[2, 15\]"),
    "out features": (change(B, lambda b: b.repeat(2, 1)), r"but got \[32, 2\]"),
    "one dimension": (change(A, lambda a: a.flatten()), r"but got \[32\]"),
    "four dimensions": (change(A, lambda a: a[..., None, None]), r"but got \[2, 16, 1, 1\]"),
    "no elements": (
        lambda t: (put(A, torch.ones(0, 16))(t), put(B, torch.ones(16, 0))(t)),
        r"but got \[0, 16\]",
    ),
    "scalar": (put(A, torch.tensor(1.0)), r"but got \[\]"),
    "bias": (change(Q0 + "base_layer.bias", lambda b: b[:3]), r"expected shape \[16\].*got \[3\]"),
    "norm": (change(NORM, lambda w: w[:3]), r"norm.weight': expected shape \[10\].*but got \[3\]"),
    # dtypes and values
    "int8": (change(A, lambda a: a.to(torch.int8)), "lora_A.weight': expected a floating dtype"),
    "int64": (change(B, lambda b: b.to(torch.int64)), "lora_B.weight': expected a floating dtype"),
    "bool": (change(A, lambda a: a > 0), "but got BOOL"),
    "uint8 norm": (change(NORM, lambda w: w.to(torch.uint8)), "norm.weight': expected a floating"),
    "complex": (
        change(A, lambda a: a.to(torch.complex64)),
        "lora_A.weight': expected a floating dtype, but got C64",
    ),
    "NaN": (change(A, fill(float("nan"))), "lora_A.weight': expected finite values"),
    "infinity": (change(B, fill(float("inf"), (-1, -1))), "lora_B.weight': expected finite values"),
    "NaN in half": (change(A, lambda a: fill(float("nan"))(a.half())), "expected finite values"),
    "NaN in float8": (
        change(A, lambda a: fill(float("nan"))(a).to(torch.float8_e5m2)),
        "expected finite values",
    ),
    "too large for float32": (
        change(A, lambda a: fill(1e300)(a.double())),
        "expected finite values",
    ),
    "NaN in a bias": (
        change(Q0 + "base_layer.bias", fill(float("nan"), 0)),
        "base_layer.bias': exp",
    ),
    "NaN in the norm": (
        change(NORM, fill(float("nan"), 0)),
        "norm.weight': expected finite values",
    ),
}


@pytest.mark.parametrize(("edit", "message"), BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_bad_tensors(edit, message, folder):
    """vllm#34186: with keys that matched nothing, the base model was served in silence."""
    edit_tensors(folder, edit)
    assert_refused(folder, f"{WEIGHTS}: .*{message}")
