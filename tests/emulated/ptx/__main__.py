import sys
import time
from pathlib import Path

from emulated.ptx import build, planted, planted_elsewhere, run


def coverage_of_clean_runs(decode: Path) -> str:
    coverage = run.Coverage()
    for program in build.PROGRAMS:
        start = time.perf_counter()
        for each in run.runs(program, *planted.clean(program)):
            coverage.add(each)
            if each.outcome != "clean":
                print(each.describe(), flush=True)
        print(f"{time.perf_counter() - start:5.1f} s  {program}", flush=True)
    return coverage.report(run.texts(decode))


def main(arguments: list[str]) -> int:
    made = build.make()
    if arguments == ["--coverage"]:
        print(coverage_of_clean_runs(made["decode"]))
        return 0
    if not arguments or arguments[0].startswith("--fault"):
        names = arguments[1:]
        missed = 0
        for fault in [*planted.FAULTS, *planted_elsewhere.FAULTS]:
            if names and fault.name not in names:
                continue
            start = time.perf_counter()
            found = run.run_fault(fault)
            missed += found.outcome == "clean"
            message = found.message.splitlines()[0] if found.message else ""
            print(
                f"{time.perf_counter() - start:5.1f} s  {fault.name}: {found.outcome}: {message}",
                flush=True,
            )
        return int(missed > 0)
    print(run.timed(*arguments))
    return 0


sys.exit(main(sys.argv[1:]))
