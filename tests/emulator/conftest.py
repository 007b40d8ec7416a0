"""The kernel tests' option, and the compilation of what the selected tests run."""

import pytest

from emulator import build


def pytest_addoption(parser):
    parser.addoption(
        "--plant",
        metavar="MUTANT",
        help="plant this fault in the clean runs, which must then fail",
    )


def program_of(item) -> list[tuple[str, str]]:
    """The programs, as (flavour, source), that a test runs according to its parameters."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if "source" in parameters:
        return [(parameters["flavour"], parameters["source"])]
    if "program" in parameters:
        flavours = [parameters["flavour"]] if "flavour" in parameters else build.FLAVOURS
        return [(flavour, build.source_of(parameters["program"])) for flavour in flavours]
    return []


@pytest.fixture(scope="session")
def programs(request):
    """All programs of all selected tests that use this fixture, compiled."""
    using = [item for item in request.session.items if "programs" in item.fixturenames]
    wanted = dict.fromkeys(program for item in using for program in program_of(item))
    return dict(zip(wanted, build.build_programs(list(wanted)), strict=True))
