"""A pytest plugin for PEFT's own suite: accelerates every LoRA model and notes which way it ran.

Loaded by `scripts/peft_suite.py`. For each test it records the outcome, whether a LoRA adapter was
injected, whether one was over a quantised base, and how often each path of `lora_ext.explain`
computed a forward. ``--plain`` records the same outcomes without acceleration.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from huggingface_hub.utils import _http
from peft import AdaLoraModel, LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora import layer as peft_layers
from torch import nn

from lora_ext.call import Call
from lora_ext.peft.layer import rows_of
from lora_ext.peft.report import peft_decision
from lora_ext.peft.swap import classes, swap
from lora_ext.quantized.layers import is_quantized


class EveryModel(defaultdict):
    """For PEFT's tests, which ask the hub about a model once: nothing is left to ask."""

    def __contains__(self, name: object) -> bool:
        return True


class Recorder:
    """What each test did."""

    def __init__(self, plain: bool, out: Path) -> None:
        self.plain, self.out = plain, out
        self.results: dict[str, dict] = {}
        self.paths: Counter[str] = Counter()
        self.quantized_paths: Counter[str] = Counter()
        self.injected = self.quantized = False

    def install(self) -> None:
        original = LoraModel.inject_adapter

        def inject_adapter(tuner, model, *args, **kwargs):
            original(tuner, model, *args, **kwargs)
            if not isinstance(tuner, AdaLoraModel):
                self.injected = True
                self.quantized |= any(map(_is_quantized, model.modules()))
            if not self.plain:
                swap(model)

        LoraModel.inject_adapter = inject_adapter
        if not self.plain:
            # Of PEFT's ParamWrapper only the outermost of a chain is ours, and stands for all.
            others = (peft_layers._ConvNd, peft_layers.MultiheadAttention)
            for kind in (*classes().values(), *others):
                if issubclass(kind, LoraLayer):
                    self._count(kind)

    def _count(self, kind: type) -> None:
        forward = kind.forward

        def counted(layer, x, *args, **kwargs):
            if (args or kwargs) and not isinstance(layer, peft_layers.ParamWrapper):
                self.paths["peft: arguments beside x"] += 1
            else:
                path, reason = peft_decision(layer).explained()
                self.paths[f"peft: {reason}" if path == "peft" else path] += 1
            if _is_quantized(layer):  # for its x, not for one in the base's dtype
                decision = layer.decide(Call(x, rows_of(layer, kwargs), args, kwargs))
                self.quantized_paths[decision.path] += 1
            return forward(layer, x, *args, **kwargs)

        kind.forward = counted

    def pytest_collection_modifyitems(self, config, items):
        """Leaves out the cases of a parametrized test that are of another method than LoRA."""
        if helpers := sys.modules.get("tests.testing_utils"):
            helpers._HUB_MODEL_ACCESSES = EveryModel(int)
        ours, others, counted = [], [], self.counted(config)
        for item in items:
            is_ours = _method(item) in (None, LoraConfig)
            is_ours = is_ours and (counted is None or item.nodeid in counted)
            (ours if is_ours else others).append(item)
        config.hook.pytest_deselected(items=others)
        items[:] = ours

    @staticmethod
    def counted(config):
        """The cases that had a quantised layer in another run, and to run accelerated passed; or
        None for all."""
        path = config.getoption("--counted")
        found = None if path is None else json.loads(path.read_text())
        if found is None:
            return None
        return {
            name
            for name, entry in found.items()
            if entry["quantized_lora"]
            and (config.getoption("--plain") or entry["outcome"] == "passed")
        }

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        self.paths.clear()
        self.quantized_paths.clear()
        self.injected = self.quantized = False
        yield

    def pytest_runtest_logreport(self, report):
        entry = self.results.setdefault(report.nodeid, {"outcome": "passed", "why": ""})
        if report.skipped and entry["outcome"] == "passed":
            entry["outcome"] = "xfailed" if hasattr(report, "wasxfail") else "skipped"
        if report.failed:
            entry["outcome"] = "failed"
            crash = getattr(report.longrepr, "reprcrash", None)
            entry["why"] = str(crash.message if crash else report.longrepr)[:300]
        entry["lora"], entry["quantized_lora"] = self.injected, self.quantized
        entry["paths"], entry["quantized"] = dict(self.paths), dict(self.quantized_paths)

    def pytest_sessionfinish(self):
        self.out.write_text(json.dumps(self.results, indent=0) + "\n")


def _is_quantized(module: nn.Module) -> bool:
    return isinstance(module, LoraLayer) and is_quantized(module.get_base_layer())


def _method(item: pytest.Item) -> type | None:
    """The class of configuration that a case is parametrized by."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return params.get("config_cls", params.get("config_class"))


def pytest_addoption(parser):
    parser.addoption("--plain", action="store_true", help="record without accelerating")
    parser.addoption("--no-avx512bf16", action="store_true", help="as if the processor had none")
    parser.addoption("--counted", type=Path, help="a record, to run what counts there")
    parser.addoption("--record", type=Path, required=True, help="the JSON file to write")


def pytest_configure(config):
    _fail_at_once_without_network()
    if config.getoption("--no-avx512bf16"):
        import bitsandbytes.nn.modules

        bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
    recorder = Recorder(config.getoption("--plain"), config.getoption("--record"))
    recorder.install()
    config.pluginmanager.register(recorder)


def _fail_at_once_without_network() -> None:
    """No waiting for the hub, which some tests need: each name fails to resolve at once."""

    def unresolved(host, *_, **__):
        raise socket.gaierror(f"no network in this run: {host}")

    class Clock:
        def __getattr__(self, name):
            return (lambda _: None) if name == "sleep" else getattr(time, name)

    _http.time = Clock()
    resolve = socket.getaddrinfo
    socket.getaddrinfo = lambda host, *rest, **words: (
        resolve if host in ("localhost", "127.0.0.1", None) else unresolved
    )(host, *rest, **words)
