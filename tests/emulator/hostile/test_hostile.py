"""The hostile list is caught, its controls are not; see build/emulator/hostile.md."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from emulator import build, run
from emulator.hostile import edited
from emulator.hostile.faults import FAULTS, SOURCES, Fault

# In this order, each until one run is not clean. Nine seeds see every schedule with every
# completion once.
STEPS = [("plain", "1:145"), ("race", "1:37")]


@dataclass(frozen=True)
class Verdict:
    fault: Fault
    alarm: run.Run | None
    ptxas: str = ""  # what the device build objects to

    @property
    def caught(self) -> bool:
        return self.alarm is not None or self.ptxas != ""


def judge(fault: Fault) -> Verdict:
    for flavour, seeds in STEPS:
        program = edited.build_edited(fault, flavour)
        # A name relative to the flavour's folder, where run_specimen looks.
        arguments = ["--seeds", seeds, "--watchdog", "10"]
        last = run.run_specimen(flavour, f"../{program}", *arguments)[-1]
        if last.outcome != "clean":
            return Verdict(fault, last)
    # Of a control the device build may say that it is slow.
    return Verdict(
        fault, None, edited.device_objections(fault) if fault.expected == "caught" else ""
    )


def table(verdicts: list[Verdict]) -> str:
    lines = [
        "| name | what | caught by | flavour | seed | first line of the message |",
        "|---|---|---|---|---|---|",
    ]
    for verdict in verdicts:
        fault, alarm = verdict.fault, verdict.alarm
        cells = [fault.name, fault.what]
        if alarm:
            first_line = alarm.message.partition("\n")[0]
            cells += [alarm.outcome, alarm.flavour, str(alarm.case["seed"]), first_line]
        elif verdict.ptxas:
            cells += ["device build", "nvcc", "", verdict.ptxas]
        elif fault.expected == "clean":
            cells += ["clean, as it should be", "", "", ""]
        else:
            cells += ["**missed**", "", "", fault.missed_because]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    faults = [verdict for verdict in verdicts if verdict.fault.expected == "caught"]
    controls = [verdict for verdict in verdicts if verdict.fault.expected == "clean"]
    caught, alarms = (sum(v.caught for v in some) for some in (faults, controls))
    lines += [
        "",
        f"- faults: {len(faults)}, caught: {caught}",
        f"- controls: {len(controls)}, alarms: {alarms}",
    ]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def verdicts():
    build.build_programs([(flavour, edited.PROGRAM) for flavour, _ in STEPS])
    with ThreadPoolExecutor(build.JOBS) as pool:
        judged = list(pool.map(judge, FAULTS))
    (build.BUILD / "hostile.md").write_text(table(judged))
    return judged


@pytest.mark.kernels
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_edits_apply(fault):
    changed = edited.apply_edits(fault, edited.originals())
    assert changed.keys() <= set(SOURCES)
    assert changed


@pytest.mark.kernels
def test_names_are_unique():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.nightly
def test_every_fault_is_caught(verdicts):
    missed = {v.fault.name for v in verdicts if v.fault.expected == "caught" and not v.caught}
    explained = {fault.name for fault in FAULTS if fault.missed_because}
    assert missed <= explained, f"not caught: {sorted(missed - explained)}"
    assert explained <= missed, f"caught, yet explained as missed: {sorted(explained - missed)}"


@pytest.mark.nightly
def test_no_control_raises_an_alarm(verdicts):
    alarms = [v for v in verdicts if v.fault.expected == "clean" and v.caught]
    assert not alarms, "\n".join(
        f"{v.fault.name}: {v.alarm.describe() if v.alarm else v.ptxas}" for v in alarms
    )
