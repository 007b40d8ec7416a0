"""The kernel of README.md: right in both flavours, and a race without its barrier."""

import pytest

from emulator import build, run

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize(
    ("flavour", "barrier", "said"),
    [
        ("plain", True, "reversed"),
        ("plain", False, "wrong at "),
        ("race", True, "reversed"),
        ("race", False, "race: "),
    ],
)
def test_example(flavour, barrier, said):
    [program] = build.build_sources([(flavour, "emulator/example/reverse.cpp")])
    done = run.execute([str(program), *([] if barrier else ["without"])], timeout=60)
    assert done.returncode == (0 if barrier else 1)
    assert done.stdout.startswith(said)


def test_the_readme_shows_this_kernel():
    first, _, program = (build.EMULATOR / "example" / "reverse.cpp").read_text().partition("\n")
    assert first.startswith("//")
    assert f"```cpp\n{program}```" in (build.EMULATOR / "README.md").read_text()
