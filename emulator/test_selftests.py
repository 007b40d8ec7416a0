"""The execution layer's own tests, in C++: each file of selftests/ is a program."""

import pytest

from emulator import build, run

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize(
    ("flavour", "source"),
    [(flavour, source) for flavour in build.FLAVOURS for source in build.selftests(flavour)],
)
def test_selftest(flavour, source, selftests):
    program = selftests[flavour, source]
    done = run.execute([str(program)], timeout=120)
    where = program.relative_to(build.ROOT)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\nreplay with: {where}"


def test_failing_selftest_ends_with_an_error():
    [program] = build.build_sources([("plain", "emulator/selftests/planted/failing.cpp")])
    assert run.execute([str(program)], timeout=60).returncode != 0
