"""A subject of one linear layer, of each kind."""

import pytest
from helpers import F64

from contract.cases import KINDS


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def subject(request):
    return request.param.make("linear", "three", F64)
