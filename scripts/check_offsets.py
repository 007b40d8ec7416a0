"""Finds offsets that are computed in 32 bits in what runs on the device: `make lint`.

clang-tidy, with the queries of .clang-tidy, reads the kernels as tests/emulated/ compiles them for
the host: four files instantiate them all. Prints what it finds; the exit status is 1 then.
"""

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from emulator.build import FOLDERS, common_flags  # noqa: E402

ALL_KERNELS = tuple(
    f"tests/emulated/kernels/{op}_kernels.cpp"
    for op in ("lora_linear_sequence", "lora_grouped_sequence", "dequantize", "lora_experts")
)


def findings(root: Path = ROOT) -> list[str]:
    """What is wrong in the kernels of a source tree, "file:line:column: what"."""
    clang_tidy = Path(sysconfig.get_path("scripts"), "clang-tidy")
    command = [str(clang_tidy), "--quiet", "--experimental-custom-checks"]
    command += [f"--config-file={ROOT / '.clang-tidy'}"]
    command += [*(str(root / kernels) for kernels in ALL_KERNELS), "--"]
    command += ["-DALL_KERNELS_IN_THIS_FILE"]
    # The plain sources, not the copies that mutants are planted in, named from the root.
    command += common_flags([*FOLDERS, ROOT / "tests"])
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    found = [
        line.removeprefix(f"{root}/")
        for line in done.stdout.splitlines()
        if re.search(r": (error|warning): ", line)
    ]
    if done.returncode != 0 and not found:
        raise RuntimeError(f"clang-tidy failed:\n{done.stdout}{done.stderr}")
    return found


if __name__ == "__main__":
    problems = findings()
    print("\n".join(problems), end="\n" if problems else "")
    sys.exit(bool(problems))
