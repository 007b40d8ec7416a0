"""Which kinds, layers and adapters a test of the contract runs over, and how near is equal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from contract.accelerated import PEFT
from contract.ours import OURS

KINDS = (OURS, PEFT)
# Names of layers. A kind has some of them.
LINEAR = ("linear", "conv1d", "fan_in_fan_out", "merged_linear")  # x is [..., in]
CALLED = ("subclass", "hooked")  # linear ones whose base has to be called as it is
MATRIX = (*LINEAR, "conv2d")
LAYERS = (*MATRIX, "embedding")

CLOSE = {"rtol": 1e-10, "atol": 1e-10}

every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def cases(layers: Iterable[str], adapters: Iterable[str]) -> pytest.MarkDecorator:
    """Parametrizes (kind, layer, adapters) over what the kinds have."""
    found = [
        pytest.param(kind, layer, names, id=f"{kind.name}-{layer}-{names}")
        for kind in KINDS
        for layer in layers
        for names in adapters
        if kind.has(layer, names)
    ]
    return pytest.mark.parametrize(("kind", "layer", "adapters"), found)


def assert_close(found: Any, wanted: Any, **words: Any) -> None:
    """As torch's; without tolerances, for float64."""
    torch.testing.assert_close(found, wanted, **{**CLOSE, **words})
