"""A workspace of dequantised weights that no other test has used."""

import pytest

from lora_ext.quantized import workspace


@pytest.fixture
def fresh_workspace():
    workspace.release()
    yield
    workspace.release()
