"""docs/verification.md says what the result files say."""

import importlib.util
import json
import shutil
from pathlib import Path

from benchmarks import results

ROOT = Path(__file__).resolve().parents[2]

spec = importlib.util.spec_from_file_location("verification", ROOT / "scripts" / "verification.py")
verification = importlib.util.module_from_spec(spec)
spec.loader.exec_module(verification)


def test_the_page_is_what_the_files_say():
    assert verification.PAGE.read_text() == verification.page(), "run scripts/verification.py"


def test_a_changed_figure_changes_the_page(tmp_path, monkeypatch):
    for path in verification.RESULTS.rglob("results.json"):
        copy = tmp_path / path.relative_to(verification.RESULTS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    headline = tmp_path / "xeon-amx-2-cores" / "headline" / "results.json"
    document = json.loads(headline.read_text())
    document["targets"][0] |= {"measured": 7.77, "verdict": "miss"}
    headline.write_text(json.dumps(document))
    gpu = results.new_document("gpu", {**document["machine"], "device": "cuda", "name": "a card"})
    gpu["stages"] = {"kernels": {"status": "done", "summary": "31 passed"}}
    where = verification.gpu_targets.WHERE
    gpu["targets"] = [{"where": where, "measured": 1.0375, "verdict": "pass"}]
    assert "| not measured yet |" in verification.kernels()
    shutil.copy(verification.RESULTS / "nightly.json", tmp_path)
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "results.json").write_text(json.dumps(gpu))
    monkeypatch.setattr(verification, "RESULTS", tmp_path)
    monkeypatch.setattr(verification, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    suite = Path("docs", "compatibility-suite.md")
    (tmp_path / suite).write_text((ROOT / suite).read_text())
    text = verification.page()
    assert "| measured: 1.038x, pass | `make gpu`, a card |" in text
    assert "not measured yet" not in text
    assert "7.77x" in text and "## a card" in text and "| kernels | done | 31 passed |" in text
