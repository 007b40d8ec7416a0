"""The kernel tests' options, and the compilation of the programs that the selected tests run."""

from dataclasses import dataclass

import pytest

from emulated import programs as kernel_programs
from emulator import build
from emulator.conftest import pytest_collection_modifyitems, pytest_sessionfinish  # noqa: F401


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


def pytest_report_header(config):
    first = config.getoption("--first-seed")
    return f"--first-seed {first}" if first else None


@dataclass(frozen=True)
class Seeds:
    """Which seeds a clean run has: the few that never change, or many that the caller chose."""

    first: int | None

    def choose(self, few, many):
        return many if self.first else few

    def range(self, few: int, many: int) -> str:
        begin = self.first or 1
        return f"{begin}:{begin + self.choose(few, many)}"


@pytest.fixture(scope="session")
def seeds(pytestconfig):
    return Seeds(pytestconfig.getoption("--first-seed"))


def programs_of(item) -> list[tuple[str, str]]:
    """As (flavour, program), what a test runs according to its parameters."""
    parameters = item.callspec.params
    flavours = [parameters["flavour"]] if "flavour" in parameters else build.FLAVOURS
    return [(flavour, parameters["program"]) for flavour in flavours]


@pytest.fixture(scope="session")
def package():
    """The package of package/, built."""
    from emulated.package import build  # which needs torch

    return build.make()


@pytest.fixture(scope="session")
def cuda_package():
    """The package of cuda/, on our CUDA runtime, built."""
    from emulated.cuda import build  # which needs torch

    return build.make()


@pytest.fixture(scope="session")
def programs(request):
    """All programs of all selected tests that use this fixture, compiled."""
    using = [item for item in request.session.items if "programs" in item.fixturenames]
    wanted = dict.fromkeys(program for item in using for program in programs_of(item))
    kernel_programs.build_programs(list(wanted))
