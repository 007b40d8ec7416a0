"""Thousands of cycles of what is done to a model: nothing is left over.

`contract/test_joints_in_sequence` has any sequence of operations.
"""

import gc
import resource
import tracemalloc
import weakref

import pytest
import torch
from adapter_helpers import make_ids, make_zoo
from layer_helpers import randomize
from safetensors.torch import load_file

import lora_ext
from lora_ext import LoraConfig, apply_lora
from lora_ext.models import lora_layers


def resident_kib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() // 1024


def check_flat_memory(tmp_path, cycles):
    """load, switch, merge, run, unmerge and delete; then no object and no page is left over."""
    model, ids = make_zoo(), make_ids()
    for name in ("kept", "stored"):
        apply_lora(model, LoraConfig(["emb", "conv"], 4), name)
    randomize(model)
    lora_ext.save_adapter(model, tmp_path, "stored")
    lora_ext.delete_adapter(model, "stored")
    base, watched = model(ids), []

    def cycle(watch=False):
        lora_ext.load_adapter(model, tmp_path, "loaded")
        lora_ext.set_adapter(model, ["kept", "loaded"])
        lora_ext.merge_adapter(model, "loaded")
        model(ids)
        if watch:
            for _, layer in lora_layers(model):
                watched.extend(map(weakref.ref, (layer.merged_weight, layer.lora_a["loaded"])))
        lora_ext.unmerge_adapter(model)
        with lora_ext.disable_adapter(model):
            model(ids)
        model(ids).sum().backward()
        lora_ext.delete_adapter(model, "loaded")
        lora_ext.set_adapter(model, "kept")
        model.zero_grad(set_to_none=True)

    for _ in range(20):
        cycle()
    gc.collect()
    tracemalloc.start()
    cycle(watch=True)
    gc.collect()
    assert watched
    assert [ref() for ref in watched] == [None] * len(watched)
    watched.clear()
    # A leak grows in every quarter. What a process had before, 40 to 190 kB of lists and dicts,
    # is replaced by traced memory in the first ones, and then no more. safetensors loses 56 bytes
    # with each tensor that it reads, also in a loop of its own.
    quarter, grown = cycles // 4, []
    allowed = 64 * quarter * len(load_file(tmp_path / "adapter_model.safetensors")) + 10_000
    objects = len(gc.get_objects())  # a list of some MB
    pages = resident_kib()
    while len(grown) < 4 or (min(grown) >= allowed and len(grown) < 12):
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(quarter):
            cycle()
        gc.collect()
        grown.append(tracemalloc.get_traced_memory()[0] - before)
    tracemalloc.stop()
    pages = resident_kib() - pages
    objects = len(gc.get_objects()) - objects
    assert objects < quarter, (
        f"{objects} tensors, dicts and the like in {len(grown) * quarter} cycles"
    )
    assert min(grown) < allowed, f"{grown} bytes of Python objects, each in {quarter} cycles"
    most = 8192 + len(grown) * allowed // 1024
    assert pages < most, f"{pages} KiB in {len(grown) * quarter} cycles, at most {most}"
    assert torch.equal(model(ids), base)


def test_200_cycles(tmp_path):
    check_flat_memory(tmp_path, 200)


@pytest.mark.nightly
def test_10000_cycles(tmp_path):
    check_flat_memory(tmp_path, 10_000)
