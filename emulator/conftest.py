"""The compilation of what the selected tests run; what sanitizers find is for the night."""

import pytest

from emulator import build, kept


def pytest_collection_modifyitems(items):
    """Sanitizers find least and take longest to compile: at night."""
    for item in items:
        if hasattr(item, "callspec") and item.callspec.params.get("flavour") == "asan":
            item.add_marker(pytest.mark.nightly)


def pytest_sessionfinish():
    kept.trim()


@pytest.fixture(scope="session")
def selftests(request):
    """All self tests, as (flavour, source), that the selected tests run, compiled."""
    using = [item for item in request.session.items if "selftests" in item.fixturenames]
    each = (item.callspec.params for item in using)
    wanted = list(dict.fromkeys((one["flavour"], one["source"]) for one in each))
    return dict(zip(wanted, build.build_sources(wanted), strict=True))
