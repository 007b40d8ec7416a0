"""A subject of one linear layer, of each kind."""

import pytest
from helpers import F64


def pytest_generate_tests(metafunc):
    if "subject" in metafunc.fixturenames:
        from contract.cases import KINDS  # which needs peft

        metafunc.parametrize("subject", KINDS, ids=lambda kind: kind.name, indirect=True)


@pytest.fixture
def subject(request):
    return request.param.make("linear", "three", F64)
