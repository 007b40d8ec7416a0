"""Trials that find what a test says, and nothing that outlives it."""

import pytest

from lora_ext.packing import pack


@pytest.fixture
def ratios(monkeypatch):
    """{(backward, rows): ratio} that trials find; 0.5 where nothing is said."""
    found = {}
    monkeypatch.setattr(
        pack,
        "ratio_of",
        lambda packs, bias, kind, rows, backward: (100.0, found.get((backward, rows), 0.5)),
    )
    monkeypatch.setattr(pack, "panels_of", lambda *operands: (None, 1.0))
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
