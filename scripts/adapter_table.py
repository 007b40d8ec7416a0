"""Writes docs/adapter-folders.md: what PEFT and load_adapter make of folders of trainers.

PYTHONPATH=tests:tests/adapters:tests/experts python scripts/adapter_table.py
"""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from pathlib import Path

from adapter_verdicts import TABLE, judge, row
from trainer_folders import folders

HEAD = """# Folders of trainers

Written by `scripts/adapter_table.py`, checked by `tests/adapters/test_adapters_wild.py`: adapter
folders as trainers and versions of PEFT write them, for tiny models, what PEFT {version} makes of
each, and what `load_adapter` does. Where it loads, the result is PEFT's. Else the message says what
to do:

- accelerate PEFT's: `accelerate(PeftModel.from_pretrained(model, folder))`, whose result is PEFT's;
- convert: the message has the lines that make `adapter_model.safetensors` of the pickle;
- PEFT's own: no LoRA.

Of {total} folders {summary}. Those that do not load are:

| folder | PEFT | load_adapter | why |
|---|---|---|---|
"""


def main() -> None:
    import peft

    warnings.simplefilter("ignore")
    rows = []
    count: Counter[str] = Counter()
    for folder in folders():
        with tempfile.TemporaryDirectory() as parent:
            verdict = judge(folder, Path(parent) / "adapter")
        count[verdict.ours] += 1
        if verdict.ours != "loads":
            rows.append(row(folder.name, verdict))
    total, loaded = count.total(), count.pop("loads")
    rest = ", ".join(f"{ours}: {number}" for ours, number in count.most_common())
    head = HEAD.format(
        version=peft.__version__, total=total, summary=f"{loaded} load; the others are {rest}"
    )
    TABLE.write_text(head + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
