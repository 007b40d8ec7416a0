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
    assert row(folder.name, verdict) in TABLE.read_text().splitlines(), (
        "make the table anew: PYTHONPATH=tests:tests/adapters python scripts/adapter_table.py"
    )


def test_the_table_has_every_folder_once():
    rows = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    names = [line.split(" | ")[0].removeprefix("| ") for line in rows[1:]]
    assert names == [folder.name for folder in FOLDERS]
    assert len(set(names)) == len(names) >= 110
