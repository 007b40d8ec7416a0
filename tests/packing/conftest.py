"""Trials that find what a test says, and nothing that outlives it."""

import pytest

from lora_ext.packing import pack
from lora_ext.packing.trial import Trial


@pytest.fixture
def ratios(monkeypatch):
    """{(backward, rows): ratio} that trials find; 0.5 where nothing is said."""
    found = {}

    def times(trial, wrong):
        ratio = found.get((trial.backward, trial.rows), 0.5)
        return {trial.ruled(wrong): [100.0], "pack": [100.0 * ratio]}

    monkeypatch.setattr(Trial, "times", times)
    return found


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """What a test measures is not used by later ones."""
    kinds = []
    kept = pack.keep_panels

    def keep(kind, backward, measured):
        kinds.append((kind, backward))
        kept(kind, backward, measured)

    monkeypatch.setattr(pack, "keep_panels", keep)
    yield
    for kind, backward in kinds:
        kept(kind, backward, [])
