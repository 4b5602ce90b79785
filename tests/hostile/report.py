"""`python -m tests.hostile.report` measures every hostile file, as a user would run bnlab on it."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from tests.hostile.files import CASES
from tests.hostile.measure import LIMIT, MEGABYTES, SECONDS, Cost, Meter


def main() -> None:
    """Print a line for each command that breaks a rule, a table by format, and the headline."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile.report", description=__doc__)
    parser.add_argument("--source", type=Path, help="folder of the package to measure: src of another checkout")
    parser.add_argument("--only", default="", help="measure the cases whose kind and name contain this text")
    parser.add_argument("--copy", action="store_true", help="copy a process that has imported everything: faster")
    parser.add_argument("--all", action="store_true", help="print a line for every command")
    parser.add_argument("--busy", action="store_true", help="judge the time of the processor: the machine is busy")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds after which a command is killed")
    parser.add_argument("--json", type=Path, help="write the measurements here")
    options = parser.parse_args()
    costs: list[Cost] = []
    with (
        tempfile.TemporaryDirectory() as name,
        Meter(Path(name), new_process=not options.copy, source=options.source, limit=options.limit) as meter,
    ):
        for case in CASES:
            if options.only not in f"{case.kind}: {case.name}":
                continue
            folder = Path(name, "case")
            folder.mkdir()
            for cost in meter.costs(case, folder):
                costs.append(cost)
                if options.all or cost.complaint(busy=options.busy):
                    print(line(cost, options.busy), flush=True)
            shutil.rmtree(folder)
    print(table(costs, options.busy))
    if options.json:
        options.json.write_text(
            json.dumps([[c.case.kind, c.case.name, c.command, *numbers(c, options.busy)] for c in costs], indent=0)
        )
    print(headline(costs, options.busy))


def numbers(cost: Cost, busy: bool) -> tuple[float, float, int | None, str | None, str]:
    """Return what a record holds of a cost."""
    return round(cost.seconds, 2), round(cost.megabytes), cost.code, cost.complaint(busy=busy), cost.stderr[-300:]


def line(cost: Cost, busy: bool) -> str:
    """Return one line about a cost."""
    verdict = cost.complaint(busy=busy) or "ends well"
    return (
        f"{cost.case.kind}: {cost.case.name} | {cost.command} | {cost.seconds:.1f} s "
        f"({cost.processor_seconds:.1f} of the processor), {cost.megabytes:.0f} MB, exit {cost.code} | "
        f"{verdict} | {cost.stderr.strip()[-160:]!r}"
    )


def table(costs: list[Cost], busy: bool) -> str:
    """Return a table of how the commands end, by format."""
    kinds = list(dict.fromkeys(cost.case.kind for cost in costs))
    ends = {kind: Counter(_end(cost, busy) for cost in costs if cost.case.kind == kind) for kind in kinds}
    names = ("ends well", "hangs", "traceback", "dies", "takes too long", "takes too much memory", "wrong end")
    rows = [
        f"| {kind} | {sum(ends[kind].values())} | " + " | ".join(str(ends[kind][n]) for n in names) + " |"
        for kind in kinds
    ]
    return "\n".join([f"| format | commands | {' | '.join(names)} |", "|" + "---|" * (len(names) + 2), *rows])


def _end(cost: Cost, busy: bool) -> str:
    complaint = cost.complaint(busy=busy)
    if complaint is None:
        return "ends well"
    for start, name in (("hangs", "hangs"), ("traceback", "traceback"), ("dies", "dies")):
        if complaint.startswith(start):
            return name
    if complaint.startswith("takes"):
        return "takes too long" if complaint.endswith(" s") else "takes too much memory"
    return "wrong end"


def headline(costs: list[Cost], busy: bool) -> str:
    """Return the main result."""
    seconds = max(cost.processor_seconds if busy else cost.seconds for cost in costs)
    good = sum(cost.complaint(busy=busy) is None for cost in costs)
    return (
        f"hostile files: {good} of {len(costs)} commands end within {SECONDS:g} s and {MEGABYTES:g} MB of an honest "
        f"one; worst {seconds:.1f} s, {max(c.megabytes for c in costs):.0f} MB"
    )


if __name__ == "__main__":
    main()
