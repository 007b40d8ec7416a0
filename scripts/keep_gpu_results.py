"""Puts what `make gpu` wrote where the repository keeps it.

    python scripts/keep_gpu_results.py FOLDER NAME

FOLDER is `make gpu`'s --out, NAME what the machine is called under benchmarks/results/. Results,
report, pictures, which are drawn here, and the autotune cache file go there; golden vectors to the
conformance tests, which then compare the execution layer with them. Then docs/verification.md is
written anew.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import report, results  # noqa: E402


def places(folder: Path, name: str, root: Path = ROOT) -> dict[Path, Path]:
    """Every file of a run -> where it is kept.

    Raises:
        ValueError: the folder has no results of a GPU, or the name is no folder's.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        raise ValueError(f"expected a name like h100-sxm, but got {name!r}")
    document = results.read(folder / "results.json")
    if document["kind"] != "gpu" or document["machine"]["device"] != "cuda":
        raise ValueError(f"{folder} holds a trial on a CPU; only a GPU's results are kept")
    own = root / "benchmarks" / "results" / name / "gpu"
    golden = root / "emulator" / "conformance" / "golden"
    found = {folder / "results.json": own / "results.json"}
    for pattern, target in (
        ("report.md", own),
        ("*.png", own),
        ("golden/*.json", golden),
        ("tuning/*.json", own),
    ):
        found |= {path: target / path.name for path in sorted(folder.glob(pattern))}
    return found


def draw(folder: Path) -> None:
    """Writes the report again, with pictures: the machine with the GPU may have no plot library."""
    path = folder / "results.json"
    report.write(results.read(path), path)


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: python scripts/keep_gpu_results.py FOLDER NAME", file=sys.stderr)
        return 2
    folder, name = Path(arguments[0]), arguments[1]
    try:
        places(folder, name)  # before anything is written
        draw(folder)
        chosen = places(folder, name)
    except (OSError, ValueError) as error:
        print(f"keep_gpu_results.py: {error}", file=sys.stderr)
        return 2
    for source, target in chosen.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        print(target.relative_to(ROOT))
    return subprocess.call([sys.executable, str(ROOT / "scripts" / "verification.py")])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
