"""The load generator of `benches/load`, as the benchmarks and the soak run it."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Cargo gives a library like ours one file in each of its directories, whatever its features are:
# the extension would be built anew after each build of this.
_TARGET = ROOT / "target" / "load"
#: The program.
LOAD = _TARGET / "release" / "examples" / "load"


def build() -> Path:
    """Build it with cargo, if it has changed; its path.

    Raises:
        CalledProcessError: cargo could not.
    """
    command = ["cargo", "build", "--release", "--quiet", "--locked", "--no-default-features"]
    command += ["--example", "load", "--target-dir", str(_TARGET)]
    subprocess.run(command, cwd=ROOT, check=True)
    return LOAD
