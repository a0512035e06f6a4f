"""gevent: each case of `greenlet_cases.py` in a process of its own, patched and not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).parent / "greenlet_cases.py"
names = [
    line.removeprefix("def case_").split("(")[0]
    for line in CASES.read_text().splitlines()
    if line.startswith("def case_")
]


@pytest.mark.parametrize("patching", ["unpatched", "patched"])
@pytest.mark.parametrize("case", names)
def test_greenlets(case, patching):
    command = [sys.executable, str(CASES), case, patching]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr, done.stderr
