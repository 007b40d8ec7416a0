"""The kernel tests' options, and the compilation of what the selected tests run."""

from dataclasses import dataclass

import pytest

from emulator import build, kept


def pytest_addoption(parser):
    parser.addoption(
        "--plant",
        metavar="MUTANT",
        help="plant this fault in the clean runs, which must then fail",
    )
    parser.addoption(
        "--first-seed",
        type=int,
        metavar="N",
        help="many seeds for each clean run, from this one on, instead of few from 1 on",
    )


def pytest_collection_modifyitems(items):
    """Sanitizers find least and take longest to compile: at night."""
    for item in items:
        if hasattr(item, "callspec") and item.callspec.params.get("flavour") == "asan":
            item.add_marker(pytest.mark.nightly)


def pytest_report_header(config):
    first = config.getoption("--first-seed")
    return f"--first-seed {first}" if first else None


def pytest_sessionfinish():
    kept.trim()


@dataclass(frozen=True)
class Seeds:
    """Which seeds a clean run has: the few that never change, or many that the caller chose."""

    first: int | None

    def count(self, few: int, many: int) -> int:
        return many if self.first else few

    def range(self, few: int, many: int) -> str:
        begin = self.first or 1
        return f"{begin}:{begin + self.count(few, many)}"


@pytest.fixture(scope="session")
def seeds(pytestconfig):
    return Seeds(pytestconfig.getoption("--first-seed"))


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
