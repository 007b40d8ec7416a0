import sys
import time

from emulated.ptx import build, planted, run


def main(arguments: list[str]) -> int:
    build.make()
    if not arguments or arguments[0].startswith("--fault"):
        names = arguments[1:]
        missed = 0
        for fault in planted.FAULTS:
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
