"""Fuzz what the network or a caller shapes: the long form of `fuzz/tests/replay.rs`.

Each target of `fuzz/` runs under the coverage-guided fuzzer, from the inputs that were kept, until
it has had RUNS inputs or SECONDS are over. Told is a table; the exit status says whether all held.

python scripts/fuzz.py [--runs N] [--seconds N] [--keep] [TARGET …]
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

FUZZ = Path(__file__).resolve().parent.parent / "fuzz"
KEPT = FUZZ / "corpus"
WORK = FUZZ / "target" / "corpus"

#: Inputs that are kept of each target at the most.
MOST_KEPT = 150


class Outcome(NamedTuple):
    """What became of a target."""

    target: str
    inputs: int
    edges: int  # of the program's branches that were taken
    rate: int  # inputs a second
    failure: str


def cargo_fuzz(*arguments: str) -> list[str]:
    return ["cargo", "+nightly", "fuzz", arguments[0], "--fuzz-dir", ".", *arguments[1:]]


def unpack(target: str) -> Path:
    """The kept inputs as the fuzzer wants them: a file each."""
    directory = WORK / target
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for number, line in enumerate((KEPT / f"{target}.hex").read_text().split("\n")):
        (directory / f"{number}").write_bytes(bytes.fromhex(line))
    return directory


def keep(target: str, directory: Path) -> None:
    """Keep what covers all that is covered, spread over the lengths."""
    subprocess.run(
        [*cargo_fuzz("cmin", "--features", "libfuzzer", target), str(directory)],
        cwd=FUZZ,
        check=True,
        capture_output=True,
    )
    inputs = sorted((file.read_bytes() for file in directory.iterdir()), key=len)
    step = max(1.0, len(inputs) / MOST_KEPT)
    chosen = [inputs[int(at * step)] for at in range(min(len(inputs), MOST_KEPT))]
    (KEPT / f"{target}.hex").write_text("\n".join(each.hex() for each in chosen))


def run(target: str, runs: int, seconds: int, keeps: bool) -> Outcome:
    directory = unpack(target)
    options = [f"-runs={runs}", f"-max_total_time={seconds}", "-max_len=4000"]
    done = subprocess.run(
        [
            *cargo_fuzz("run", "--features", "libfuzzer", target),
            *(str(directory), "--", *options, "-print_final_stats=1", "-timeout=60"),
        ],
        cwd=FUZZ,
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        check=False,
    )

    def last(pattern: str) -> int:
        found = re.findall(pattern, done.stderr)
        return int(found[-1]) if found else 0

    failure = ""
    if done.returncode:
        log = FUZZ / "target" / f"{target}.log"
        log.write_text(done.stderr)
        failure = f"exit {done.returncode}, see {os.path.relpath(log)}"
    elif keeps:
        keep(target, directory)
    return Outcome(
        target,
        last(r"stat::number_of_executed_units: +(\d+)"),
        last(r" cov: (\d+)"),
        last(r"stat::average_exec_per_sec: +(\d+)"),
        failure,
    )


def main() -> int:
    targets = sorted(file.stem for file in KEPT.glob("*.hex"))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(targets))
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--keep", action="store_true", help="keep what covers more")
    given = parser.parse_args()
    if unknown := set(given.targets) - set(targets):
        parser.error(
            f"no such target: {', '.join(sorted(unknown))}; there are {', '.join(targets)}"
        )
    if subprocess.run(cargo_fuzz("--version")[:4], capture_output=True, check=False).returncode:
        print(
            "the fuzzer is missing: rustup toolchain install nightly && cargo install cargo-fuzz",
            file=sys.stderr,
        )
        return 2
    print(f"{platform.platform()}, {os.cpu_count()} cores\n")
    print(
        "| target | inputs | edges | inputs/s | |\n| --- | ---: | ---: | ---: | --- |", flush=True
    )
    outcomes = []
    for target in given.targets or targets:
        its = run(target, given.runs, given.seconds, given.keep)
        outcomes.append(its)
        said = its.failure or "held"
        print(f"| {target} | {its.inputs:,} | {its.edges:,} | {its.rate:,} | {said} |", flush=True)
    return 1 if any(its.failure for its in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
