"""Fuzz what the network or a caller shapes: the long form of `fuzz/tests/replay.rs`, and of
`tests/test_properties.py`.

Each target of `fuzz/` runs under the coverage-guided fuzzer, from the inputs that were kept, until
it has had RUNS inputs or SECONDS are over. The target `callers` is what Python code gives: EXAMPLES
inputs for each of its tests. Told is a table; the exit status says whether all held.

python scripts/fuzz.py [--runs N] [--seconds N] [--examples N] [--jobs N] [--sanitizer none]
                       [--keep] [TARGET …]
"""

from __future__ import annotations

import argparse
import os
import platform
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FUZZ = ROOT / "fuzz"
KEPT = FUZZ / "corpus"
WORK = FUZZ / "target" / "corpus"

#: What Python code gives, tested by `tests/test_properties.py`.
CALLERS = "callers"

#: Inputs that are kept of each target at the most, and the bytes of each and of all.
MOST_KEPT = 150
LONGEST_KEPT = 1500
MOST_BYTES_KEPT = 40_000

#: What their threads still hold at the end of an input looks like a leak, and is searched for.
THREADED = ["store"]

#: Processors, each for one target at a time.
processors: queue.SimpleQueue[int] = queue.SimpleQueue()


class Outcome(NamedTuple):
    """What became of a target."""

    target: str
    inputs: int
    edges: int  # of the program's branches that were taken
    rate: int  # inputs a second
    failure: str


def cargo_fuzz(command: str, *arguments: str, sanitizer: str) -> list[str]:
    line = ["cargo", "+nightly", "fuzz", command, "--fuzz-dir", "."]
    line += ["--features", "libfuzzer", "--sanitizer", sanitizer]
    if sanitizer == "none":
        # To look into each comparison is two thirds of the time of a target that compresses.
        line.append("--no-trace-compares")
    # Each has its own, or all would be built anew whenever the other is wanted.
    line += ["--target-dir", f"target/{sanitizer}"]
    return [*line, *arguments]


def unpack(target: str) -> Path:
    """The kept inputs as the fuzzer wants them: a file each."""
    directory = WORK / target
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for number, line in enumerate((KEPT / f"{target}.hex").read_text().split("\n")):
        (directory / f"{number}").write_bytes(bytes.fromhex(line))
    return directory


def keep(target: str, directory: Path, sanitizer: str) -> None:
    """Keep what covers all that is covered, spread over the lengths."""
    subprocess.run(
        [*cargo_fuzz("cmin", target, sanitizer=sanitizer), str(directory)],
        cwd=FUZZ,
        check=True,
        capture_output=True,
    )
    contents = (file.read_bytes() for file in directory.iterdir())
    inputs = sorted((each for each in contents if len(each) <= LONGEST_KEPT), key=len)
    step = max(1.0, len(inputs) / MOST_KEPT)
    chosen = [inputs[int(at * step)] for at in range(min(len(inputs), MOST_KEPT))]
    while sum(map(len, chosen)) > MOST_BYTES_KEPT:
        # The longest are mostly others with something added.
        chosen.pop()
    (KEPT / f"{target}.hex").write_text("\n".join(each.hex() for each in chosen))


def on_one_processor(target: str, given: argparse.Namespace) -> Outcome:
    """Run a target where its threads need not wake each other on another processor: the store's
    is three times as fast so."""
    processor = processors.get()
    try:
        if hasattr(os, "sched_setaffinity"):
            # Of this thread; what it starts inherits it.
            os.sched_setaffinity(0, {processor})
        if target == CALLERS:
            return run_callers(given.examples)
        return run(target, given)
    finally:
        processors.put(processor)


def run_callers(examples: int) -> Outcome:
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "tests/test_properties.py", "--timeout", "0"]
    done = subprocess.run(
        [*command, "--hypothesis-show-statistics", "-q"],
        cwd=ROOT,
        env={**os.environ, "FUZZ_EXAMPLES": str(examples)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    passed = re.findall(r"(\d+) passing", done.stdout)
    inputs = sum(map(int, passed))
    failure = log_of(CALLERS, done.returncode, done.stdout)
    return Outcome(CALLERS, inputs, 0, round(inputs / (time.monotonic() - began)), failure)


def log_of(target: str, status: int, output: str) -> str:
    """What to say of a target that failed; its output is kept."""
    if not status:
        return ""
    log = FUZZ / "target" / f"{target}.log"
    log.parent.mkdir(exist_ok=True)
    log.write_text(output)
    return f"exit {status}, see {os.path.relpath(log)}"


def run(target: str, given: argparse.Namespace) -> Outcome:
    # What it leaves when it is stopped in the middle of an input goes with this; in memory.
    shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="sse-fuzz-", dir=shared) as temporary:
        return fuzz(target, given, temporary)


def fuzz(target: str, given: argparse.Namespace, temporary: str) -> Outcome:
    directory = unpack(target)
    # A step of a model is some bytes: short inputs alone would do too little.
    options = [f"-runs={given.runs}", f"-max_total_time={given.seconds}"]
    options += ["-max_len=4000", "-len_control=0"]
    if target in THREADED:
        options.append("-detect_leaks=0")
    done = subprocess.run(
        [
            *cargo_fuzz("run", target, sanitizer=given.sanitizer),
            *(str(directory), "--", *options, "-print_final_stats=1", "-timeout=60"),
        ],
        cwd=FUZZ,
        env={**os.environ, "TMPDIR": temporary},
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        check=False,
    )

    def last(pattern: str) -> int:
        found = re.findall(pattern, done.stderr)
        return int(found[-1]) if found else 0

    failure = log_of(target, done.returncode, done.stderr)
    if given.keep and not failure:
        keep(target, directory, given.sanitizer)
    return Outcome(
        target,
        last(r"stat::number_of_executed_units: +(\d+)"),
        last(r" cov: (\d+)"),
        last(r"stat::average_exec_per_sec: +(\d+)"),
        failure,
    )


def main() -> int:
    rust = sorted(file.stem for file in KEPT.glob("*.hex"))
    targets = [*rust, CALLERS]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(targets))
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--examples", type=int, default=5000, help="for each test of `callers`")
    parser.add_argument("--jobs", "-j", type=int, default=1, help="targets at a time")
    parser.add_argument(
        "--sanitizer",
        choices=["address", "none"],
        default="address",
        help="none: several times as many inputs; neither unsafe code nor comparisons are watched",
    )
    parser.add_argument("--keep", action="store_true", help="keep what covers more")
    given = parser.parse_args()
    if unknown := set(given.targets) - set(targets):
        parser.error(
            f"no such target: {', '.join(sorted(unknown))}; there are {', '.join(targets)}"
        )
    chosen = given.targets or targets
    fuzzed = [target for target in chosen if target != CALLERS]
    asked = ["cargo", "+nightly", "fuzz", "--version"]
    is_there = subprocess.run(asked, capture_output=True, check=False)
    if fuzzed and is_there.returncode:
        print(
            "the fuzzer is missing: rustup toolchain install nightly && cargo install cargo-fuzz",
            file=sys.stderr,
        )
        return 2
    if fuzzed:
        # Once for all, or each would wait for the other's.
        subprocess.run(cargo_fuzz("build", sanitizer=given.sanitizer), cwd=FUZZ, check=True)
    of_this = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(given.jobs)
    for processor in sorted(of_this)[: given.jobs]:
        processors.put(processor)
    print(
        f"{platform.platform()}, {os.cpu_count()} cores, {given.jobs} targets at a time, "
        f"sanitizer: {given.sanitizer}\n"
    )
    print(
        "| target | inputs | edges | inputs/s | |\n| --- | ---: | ---: | ---: | --- |", flush=True
    )
    outcomes = []
    with ThreadPoolExecutor(given.jobs) as pool:
        for its in pool.map(lambda target: on_one_processor(target, given), chosen):
            outcomes.append(its)
            edges = f"{its.edges:,}" if its.edges else ""
            said = its.failure or "held"
            print(
                f"| {its.target} | {its.inputs:,} | {edges} | {its.rate:,} | {said} |", flush=True
            )
    return 1 if any(its.failure for its in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
