"""Run the models of `races/`: what happens when two things happen at once.

First under the checker (shuttle), which decides at each step whose is next: so many schedules of
each model. Then on the system's threads, with crossbeam's channels and real descriptors; the short
form leaves that to `cargo test`.

python scripts/races.py [--quick] [--rounds N] [--replay SCHEDULE] [MODEL …]
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# In a directory of its own: one file is the library of whatever features, and `make test` would
# take that of the other for its own.
CARGO = ["test", "--quiet", "--locked", "--no-default-features", "--target-dir", "target/races"]

#: Schedules of each model.
ROUNDS = 100_000
QUICK = 2_000

#: Of each model on the system's threads.
ON_THREADS = 20_000


def cargo(*arguments: str) -> int:
    return subprocess.run(["cargo", *CARGO, *arguments], cwd=ROOT, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} schedules of each model")
    parser.add_argument("--rounds", type=int, help=f"schedules of each model, not {ROUNDS}")
    parser.add_argument("--replay", metavar="SCHEDULE", help="what the checker printed, of a MODEL")
    given = parser.parse_args()
    if given.replay and len(given.models) != 1:
        parser.error("a schedule is one model's: name it")
    rounds = given.rounds or (QUICK if given.quick else ROUNDS)
    print(f"{platform.platform()}, {os.cpu_count()} cores\n", flush=True)
    arguments = ["--replay", given.replay] if given.replay else ["--rounds", str(rounds)]
    checked = cargo("--features", "shuttle", "--test", "races", "--", *arguments, *given.models)
    if checked or given.quick or given.replay:
        return checked
    print("\nOn the system's threads:\n", flush=True)
    return cargo("--test", "races", "--", "--rounds", str(min(rounds, ON_THREADS)), *given.models)


if __name__ == "__main__":
    sys.exit(main())
