"""Measures what the document lacks, each thing in a child: cells, batches of many
adapters, layers of experts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .. import runner
from ..adapters.cases import Case
from ..shapes import Cell
from ..timing import Plan
from . import children
from .mixtures import Mixture
from .run import Run
from .stages import Result, result_of

_PLAN = Plan(min_rounds=5, max_rounds=11, seconds=1.2, batch_ms=4.0, max_inner=20, warmup_ms=20.0)
_QUICK_PLAN = replace(_PLAN, min_rounds=3, max_rounds=5, seconds=0.4)


@dataclass(frozen=True)
class Kind:
    """What is measured alike.

    Attributes:
        task: of child_tasks.py; it takes what is to be measured and gives the entry.
        part: where the document has the entries.
        subject: the key of what an entry is of.
    """

    task: str
    part: str
    subject: str


CELLS = Kind("cell", "cells", "cell")
CASES = Kind("adapters", "adapters", "case")
MIXTURES = Kind("mixtures", "mixtures", "case")

Subject = Cell | Case | Mixture


def measured(
    run: Run,
    kind: Kind,
    chosen: Sequence[Subject],
    seconds: float,
    limit_s: Callable[[Any], float],
) -> Result:
    """Measures what the document does not have; partial until it has them all.

    limit_s: how long one may take
    """
    until = run.until(seconds)
    entries = run.document.setdefault(kind.part, [])
    todo = _todo(entries, kind, chosen)
    by_name = {one.id: one for one in todo}
    plan = _QUICK_PLAN if run.quick else _PLAN
    effort_left = sum(one.effort for one in todo)

    def ready(item: children.Item) -> children.Item:
        """With its share of what is left."""
        nonlocal effort_left
        effort = by_name[item.name].effort
        share_s = runner.share_s(effort, effort_left, until - time.monotonic())
        effort_left -= effort
        own = replace(plan.times(effort), limit_s=share_s)
        return replace(item, fields={**item.fields, "plan": asdict(own)})

    items = [children.Item(one.id, {kind.subject: asdict(one)}, limit_s(one)) for one in todo]
    failed = False
    for item, answer in children.each(run, kind.task, items, until, ready):
        subject = by_name[item.name].as_dict()
        entry = (answer.result or {}).get("entry")
        if not isinstance(entry, dict) or entry.get(kind.subject) != subject:
            error = answer.error or f"an answer without the {kind.subject}"
            entry = {kind.subject: subject, "errors": {}, "notes": {}}
            entry |= {"status": "error", "error": error, "tail": answer.tail}
        elif answer.error:  # a fault of the device, after which nothing of it can be trusted
            entry |= {"status": "error", "error": answer.error, "tail": answer.tail}
        failed |= entry["status"] == "error"
        _keep(run, kind, entry)
    return _result(run, kind, chosen, failed)


def _result(run: Run, kind: Kind, chosen: Sequence[Subject], failed: bool) -> Result:
    """failed: whether one has ended in an error now."""
    names = [one.id for one in chosen]
    status = {entry[kind.subject]["id"]: entry["status"] for entry in run.document[kind.part]}
    missed = [name for name in names if name not in status]
    others = [name for name in run.document["skipped"] if name not in names]
    run.document["skipped"] = others + missed
    summary = f"{len(names) - len(missed)} of {len(names)} {kind.subject}s"
    ended = {
        what: [name for name in names if status.get(name) == what] for what in ("error", "wrong")
    }
    if ended["error"]:
        summary += f", {len(ended['error'])} of them errors, such as {ended['error'][0]}"
    if ended["wrong"]:
        summary += f", {len(ended['wrong'])} of them wrong, such as {ended['wrong'][0]}"
    whole = not (missed or ended["error"] or run.quick)
    failed |= bool(ended["wrong"])
    return result_of("failed" if failed else "done" if whole else "partial", summary)


def _todo(entries: Sequence[Any], kind: Kind, chosen: Sequence[Subject]) -> list[Subject]:
    """What has no entry; last what ended in an error, which may be a hang."""
    status = {entry[kind.subject]["id"]: entry["status"] for entry in entries}
    new = [one for one in chosen if one.id not in status]
    return new + [one for one in chosen if status.get(one.id) == "error"]


def _keep(run: Run, kind: Kind, entry: dict[str, Any]) -> None:
    """Puts an entry in the place of an earlier one, and writes the document."""
    entries = run.document[kind.part]
    name = entry[kind.subject]["id"]
    entries[:] = [each for each in entries if each[kind.subject]["id"] != name]
    entries.append(entry)
    run.write()
