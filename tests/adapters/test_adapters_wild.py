"""Folders as people's trainers write them: each loads with PEFT's result, or says what to do."""

import pytest
from adapter_verdicts import TABLE, judge, row
from trainer_folders import folders

FOLDERS = folders()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_of_a_trainer(folder, tmp_path):
    verdict = judge(folder, tmp_path / "adapter")
    assert verdict.ours != "refused"
    assert not verdict.differs
    told = [
        line for line in TABLE.read_text().splitlines() if line.startswith(f"| {folder.name} |")
    ]
    assert told == ([] if verdict.ours == "loads" else [row(folder.name, verdict)]), (
        "make the table anew: PYTHONPATH=tests:tests/adapters python scripts/adapter_table.py"
    )


def test_the_page_counts_every_folder():
    names = [folder.name for folder in FOLDERS]
    assert len(set(names)) == len(names) >= 110
    assert f"Of {len(names)} folders " in TABLE.read_text()
