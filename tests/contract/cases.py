"""Which kinds, layers and adapters a test of the contract runs over, and how near is equal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from step_helpers import assert_same

from contract import bases
from contract.accelerated import PEFT
from contract.ours import OURS
from contract.subject import Subject

KINDS = (OURS, PEFT)
# Names of layers. A kind has some of them.
LINEAR = ("linear", "conv1d", "fan_in_fan_out", "merged_linear")  # x is [..., in]
CALLED = ("subclass", "hooked")  # linear ones whose base has to be called as it is
MATRIX = (*LINEAR, "conv2d")
LAYERS = (*MATRIX, "embedding")
QUANTISED = bases.FEW  # one form of each
EXPERTS = (*bases.DENSE, *bases.PACKED)

Step = dict[str, torch.Tensor | None]
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


def assert_as_eager(
    subject: Subject,
    adapters: str,
    found: Step,
    wanted: Step,
    rounded_to: torch.dtype | None = None,
    slack: float = 1.0,
) -> None:
    """Two steps of `step_helpers.run` bit for bit; to the last bits where eager has blocks of rows.

    Args:
        rounded_to: a dtype that is used between, as under autocast.
        slack: by how much the tolerance is larger, as for several layers.
    """
    if not subject.kind.has_blocks(subject.name, adapters):
        assert_same(found, wanted)
        return
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if value is None:
            assert found[name] is None, name
            continue
        wide = {torch.float64: 1e-11, torch.float32: 1e-5}
        tolerance = slack * wide.get(rounded_to or value.dtype, 2e-2)
        limit = tolerance * max(1.0, value.abs().max().item())
        assert_close(found[name], value, rtol=tolerance, atol=limit, msg=name)
