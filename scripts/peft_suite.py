"""Runs PEFT's own LoRA tests on accelerated models and writes what came of it to the docs.

    python scripts/peft_suite.py             # 25 minutes; writes docs/compatibility-suite.md
    python scripts/peft_suite.py --keep      # takes files that an earlier run recorded from there
    python scripts/peft_suite.py --only test_custom_models
    python scripts/peft_suite.py --without-hub     # 10 minutes; prints

The source distribution of the installed PEFT is downloaded by pip and unpacked under build/, so
that nothing of it becomes part of this repository. The models that its tests load by name are made
by scripts/peft_suite_hub.py: small ones with random weights; `--without-hub` leaves the tests that
need one out. Each test file runs twice in a process of its own, with
tests/peft_suite/peft_suite_plugin.py: as it is, and with `lora_ext.accelerate` on every LoRA model.
A test that is parametrized by the methods of PEFT runs for LoRA alone. A case counts if it injects
a LoRA adapter and passes as it is: the rest needs a download, a GPU or a package that is not here.
PEFT's tests want `pip install attrs datasets diffusers parameterized scipy torchvision`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "compatibility-suite.md"
HUB = str(ROOT / "scripts" / "peft_suite_hub.py")
SECONDS = 3600  # of one file
FAST = ("fused", "library", "added")

# Cases that only PEFT's own forward can pass -> why.
EXPECTED = {
    "tests/test_target_parameters.py::TestTargetParameters::"
    "test_target_parameter_result_caching_works": "it counts PEFT's sums W + B A of all experts, "
    "and here none is made",
}

# File -> what was noted of its cases as they are, and accelerated.
Results = dict[str, tuple[dict[str, dict], dict[str, dict]]]

# Files whose cases all need a GPU.
NEED_GPU = {"test_common_gpu", "test_gptqmodel", "test_gpu_examples"}
# Files whose cases all need models from the hub.
NEED_HUB = {
    "test_auto",
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_hub_features",
    "test_seq_classifier",
    "test_stablediffusion",
    "test_token_classification_qa",
    "test_vision_models",
    "test_xlora",
}


def unpacked(folder: Path) -> Path:
    """The tests of the installed PEFT's release, as a package."""
    release = f"peft-{version('peft')}"
    if not (folder / release).is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        source = ["--no-binary", ":all:", "--no-build-isolation", "--dest", str(folder)]
        subprocess.run([*pip, *source, release.replace("-", "==")], check=True)
        with tarfile.open(folder / f"{release}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    (folder / release / "tests" / "__init__.py").touch()
    return folder / release


def made_hub(folder: Path, keep: bool, name: str = "hub", maker: Sequence[str] = (HUB,)) -> Path:
    """A folder for HF_HOME that has the models that PEFT's tests load, made by a script."""
    hub, made = folder / name, folder / f"{name}-made"
    if not (keep and hub.exists()):
        for old in (hub, made):
            shutil.rmtree(old, ignore_errors=True)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        with (folder / f"{name}.log").open("w") as log:
            command = [sys.executable, *maker, str(made)]
            subprocess.run(command, env=environment, stdout=log, stderr=log, check=True)
        made.rename(hub)
    return hub


def run(
    release: Path,
    name: str,
    plain: bool,
    hub: Path | None = None,
    keep: bool = False,
    records: Path | None = None,
    more: Sequence[str] = (),
) -> dict[str, dict]:
    """Case -> what the plugin noted of it.

    Args:
        records: the folder of what is noted, by default one beside the release.
        more: arguments of pytest.
    """
    if records is None:
        records = release.parent / ("records-with-hub" if hub else "records-without-hub")
    records.mkdir(exist_ok=True)
    record = records / f"{name}-{'plain' if plain else 'accelerated'}.json"
    if keep and record.exists():
        return json.loads(record.read_text())
    record.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'peft_suite'}",
        "HF_HOME": str(hub or records / "no-hub"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "pytest", "-p", "peft_suite_plugin", "-q", "--tb=short"]
    # PEFT's settings make errors of what a transformers newer than it warns of.
    command += ["-o", "addopts=", "-o", "filterwarnings=", "--rootdir", "."]
    command += ["-p", "no:cacheprovider"]
    command += [f"tests/{name}.py", "--record", str(record)]
    command += ["--plain", *more] if plain else more
    log = record.with_suffix(".log").open("w")
    try:
        subprocess.run(
            command, cwd=release, env=environment, stdout=log, stderr=log, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        print(f"{name}: more than {SECONDS} s", file=sys.stderr)
    return json.loads(record.read_text()) if record.exists() else {}


def files(release: Path, with_hub: bool) -> list[str]:
    """Test files that mention LoRA's config and run with what is here."""
    found = (release / "tests").glob("test_*.py")
    named = {path.stem for path in found if "LoraConfig" in path.read_text()}
    return sorted(named - NEED_GPU - (set() if with_hub else NEED_HUB))


def group_of(entry: dict) -> str:
    """Which forwards a case ran: a fast one, PEFT's alone, or none at all."""
    if any(path in FAST for path in entry["paths"]):
        return "fast"
    return "peft" if any(path.startswith("peft") for path in entry["paths"]) else "none"


class Count(NamedTuple):
    """What came of a run.

    Attributes:
        rows: (file, counts) and a last one of all.
        failures: a line for each case that fails accelerated alone.
        unable: a line for each that fails as it is.
        left_out: outcome -> how many of those that do not pass as they are.
    """

    rows: list[tuple[str, Counter[str]]]
    failures: list[str]
    unable: list[str]
    left_out: Counter[str]

    @property
    def total(self) -> Counter[str]:
        return self.rows[-1][1]

    def table(self, ways: dict[str, str]) -> list[str]:
        """ways: what `way_of` may say -> what stands above its column."""
        return [
            " | ".join(["| file", "cases", "passed", *ways.values()]) + " |",
            "| --- " * (3 + len(ways)) + "|",
            *(
                f"| {name} | {c['cases']} | {c['passed']} | "
                + " | ".join(f"{c[f'{way} passed']} of {c[way]}" for way in ways)
                + " |"
                for name, c in self.rows
            ),
        ]


def count(results: Results, adapted: str, way_of: Callable[[dict], str]) -> Count:
    """adapted: the entry of the cases that count; way_of: which forwards a case ran."""
    found = Count([], [], [], Counter())
    total: Counter[str] = Counter()
    for name, (plain, accelerated) in results.items():
        counts: Counter[str] = Counter()
        for case, entry in plain.items():
            if not entry.get(adapted):
                continue
            if entry["outcome"] != "passed":
                found.left_out[entry["outcome"]] += 1
                if entry["outcome"] == "failed":
                    found.unable.append(f"- `{case}`: {first_line(entry)}")
                continue
            ours = accelerated.get(case, {"outcome": "missing", "paths": {}, "why": ""})
            passed, way = ours["outcome"] == "passed", way_of(ours)
            counts.update({"cases": 1, "passed": passed, way: 1, f"{way} passed": passed})
            if not passed:
                why = EXPECTED.get(case) or first_line(ours)
                found.failures.append(f"- `{case}`: {ours['outcome']}. {why}")
        if counts:
            total += counts
            found.rows.append((name, counts))
    found.rows.append(("all", total))
    return found


def first_line(entry: dict) -> str:
    return "".join(entry["why"].splitlines()[:1])


def page(parts: list[str]) -> str:
    """Lines of tables and of lists follow one another, other parts stand apart."""
    text = "\n\n".join(parts) + "\n"
    return re.sub(r"\|\n\n\|", "|\n|", text).replace("\n\n- ", "\n- ")


def report(results: Results) -> str:
    """The document."""
    found = count(results, "lora", group_of)
    total = found.total
    plain = [(name, case, entry) for name, one in results.items() for case, entry in one[0].items()]
    reasons = Counter(
        path.removeprefix("peft: ")
        for name, case, entry in plain
        if entry["outcome"] == "passed" and entry.get("lora")
        for path in results[name][1].get(case, {"paths": {}})["paths"]
        if path.startswith("peft: ")
    )
    before = sum(entry["outcome"] == "failed" and not entry.get("lora") for *_, entry in plain)
    without = [name for name, (cases, _) in results.items() if not cases]
    share = 100 * total["passed"] / max(1, total["cases"])
    ways = {
        "fast": "with a fast forward",
        "peft": "with PEFT's forward only",
        "none": "without a forward of a LoRA layer",
    }
    return page(
        [
            "# PEFT's own tests on accelerated models",
            f"PEFT {version('peft')}, torch {version('torch')}, CPU. Written by "
            "`python scripts/peft_suite.py`; its docstring says what counts.",
            f"**{total['passed']} of {total['cases']} cases pass, {share:.2f} %**; of those in "
            f"which a fast path computed a forward, {total['fast passed']} of {total['fast']}.",
            *found.table(ways),
            "## Why PEFT's own forward ran",
            "| reason | cases |",
            "| --- | --- |",
            *(f"| {text} | {number} |" for text, number in reasons.most_common()),
            "## Cases that fail accelerated and pass as they are",
            *(found.failures or ["None."]),
            "## LoRA cases that are left out",
            ", ".join(f"{number} {outcome}" for outcome, number in found.left_out.most_common())
            + " as they are, without acceleration: they need a download, a GPU or another package. "
            f"Not counted: {before} fail so before a LoRA adapter is injected.",
            *found.unable,
            "Not run for this table, since all cases ask for a GPU: "
            f"{', '.join(sorted(NEED_GPU))}; those of quantised bases are below. "
            f"Without a case of LoRA that can be run: {', '.join(without) or 'none'}.",
        ]
    )


def parser_of(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--only", default="", help="files whose name contains this text; prints")
    parser.add_argument("--keep", action="store_true", help="take what was recorded before")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "peft-suite")
    return parser


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--without-hub", action="store_true", help="make no models; print")
    options = parser.parse_args()
    folder = options.folder.resolve()
    release = unpacked(folder)
    hub = None if options.without_hub else made_hub(folder, options.keep)
    results = {}
    for name in files(release, with_hub=hub is not None):
        if options.only in name:
            print(name, file=sys.stderr, flush=True)
            both = (run(release, name, plain, hub, options.keep) for plain in (True, False))
            results[name] = tuple(both)
    text = report(results)
    if options.only or options.without_hub:
        print(text)
    else:
        # What scripts/peft_suite_quantized.py added stays.
        found = re.search(r"\n## Quantised bases\n.*", DOCUMENT.read_text(), re.DOTALL)
        DOCUMENT.write_text(text + (found[0] if found else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
