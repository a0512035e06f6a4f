"""Faults on purpose: what goes wrong in production, and what became of each event meanwhile.

    python scripts/faults.py                    # each for half a minute
    python scripts/faults.py --seconds 120
    python scripts/faults.py "kill" "the disk"  # those whose name contains one of the texts

Each runs the news example under three workers of gunicorn, with 30 clients that come back as
browsers do, and three processes that publish a hundred events a second each. Those that need what
the machine has not are skipped by name, and fail where CI is set. The report is printed, and
written to .faults/report.md. The exit status is 0 when none failed and at least one held.
"""

from __future__ import annotations

import argparse
import datetime
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import sse_channel

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".faults"
sys.path.insert(0, str(ROOT / "tests"))

from faults import FAULTS, Outcome, conditions, run  # noqa: E402

_HEAD = (
    "| fault | bus | worker | hits | s | acknowledged | refused | lost | doubled | out of order "
    "| told | connections | longest silence, s | MB a worker | descriptors | standstill, s |"
)


def row(outcome: Outcome) -> str:
    tally = outcome.tally
    hits = ", ".join(f"{count}" for count in outcome.blows.values())
    cells = [
        outcome.fault.name,
        outcome.bus,
        outcome.kind.removeprefix("gunicorn-").removesuffix("-3"),
        hits,
        f"{outcome.seconds:.0f}",
        f"{tally.acknowledged:,}",
        f"{tally.refused:,}",
        f"{tally.lost}",
        f"{tally.doubled}",
        f"{tally.disordered}",
        f"{tally.told}",
        f"{tally.connections:,}",
        f"{tally.longest_silence:.1f}",
        f"{outcome.before.memory / 1e6:.0f} → {outcome.after.memory / 1e6:.0f}",
        f"{outcome.before.descriptors:.0f} → {outcome.after.descriptors:.0f}",
        f"{outcome.standstill:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def report(
    outcomes: Sequence[Outcome],
    skipped: Sequence[tuple[str, str]],
    broken: Sequence[tuple[str, str]] = (),
) -> str:
    """The report: a table, what should not be, and what was left out."""
    held = sum(not outcome.problems for outcome in outcomes)
    lines = [
        f"{datetime.date.today()}, {conditions()}",
        "",
        _HEAD,
        "| --- | --- | --- |" + " ---: |" * (_HEAD.count("|") - 4),
        *map(row, outcomes),
        "",
        *(
            f"FAILED: {outcome.fault.name}, {outcome.bus}, {outcome.kind}: {problem}"
            for outcome in outcomes
            for problem in outcome.problems
        ),
        *(f"FAILED: {name}: {why}" for name, why in broken),
        *(f"skipped: {name}: {why}" for name, why in skipped),
        f"{len(outcomes) + len(broken)} faults: {held} held, "
        f"{len(outcomes) - held + len(broken)} failed, "
        f"{len(skipped)} skipped",
    ]
    return "\n".join(lines)


def extension() -> tuple[int, int]:
    """What tells one build of the extension from another."""
    built = Path(sse_channel._sse_channel.__file__).stat()
    return built.st_mtime_ns, built.st_size


def has_held(outcomes: Sequence[Outcome]) -> bool:
    return bool(outcomes) and not any(outcome.problems for outcome in outcomes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only faults whose name contains one of these")
    parser.add_argument("--seconds", type=float, default=30, help="of each (30)")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    chosen = parser.parse_args()
    wanted = [
        (fault, bus, kind)
        for fault in FAULTS
        if not chosen.names or any(name in fault.name for name in chosen.names)
        for bus in fault.buses
        for kind in fault.kinds
    ]
    if not wanted:
        parser.error(f"no fault of that name; there are: {', '.join(f.name for f in FAULTS)}")
    WORK.mkdir(exist_ok=True)
    print(f"seed {chosen.seed}", flush=True)
    outcomes: list[Outcome] = []
    skipped: list[tuple[str, str]] = []
    broken: list[tuple[str, str]] = []
    began_with = extension()
    try:
        for number, (fault, bus, kind) in enumerate(wanted, 1):
            log = WORK / f"{number}.log"
            what = f"{fault.name}, {bus.__name__}, {kind}"
            print(f"{what} …", end=" ", flush=True)
            chance = random.Random(chosen.seed)
            try:
                outcome = run(fault, bus, kind, seconds=chosen.seconds, chance=chance, log=log)
            except pytest.skip.Exception as skip:
                skipped.append((what, str(skip)))
                print("skipped")
            except (AssertionError, pytest.fail.Exception) as failure:
                broken.append((what, f"{failure} ({log.name})"))
                print(f"FAILED: {failure}", flush=True)
            else:
                outcomes.append(outcome)
                print("; ".join(outcome.problems) or "held", flush=True)
    except KeyboardInterrupt:
        broken.append(("the rest", "interrupted"))
        print("interrupted; so far:")
    if extension() != began_with:
        # Workers that started meanwhile may have found half of it, or another version.
        broken.append(("all of them", "the extension was built anew meanwhile; run them again"))
    text = report(outcomes, skipped, broken)
    (WORK / "report.md").write_text(f"{text}\n")
    print(f"\n{text}")
    return 0 if has_held(outcomes) and not broken else 1


if __name__ == "__main__":
    sys.exit(main())
