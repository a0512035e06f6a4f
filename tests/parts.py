"""Parts of the machine that some tests need and that may be missing."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest


def missing(part: str) -> NoReturn:
    """Skip the test for want of `part`; where CI is set, fail it."""
    if os.environ.get("CI"):
        pytest.fail(f"{part} is missing, and CI must run this test")
    pytest.skip(f"{part} is missing")


def chromium() -> str:
    """The path of Chromium: $CHROMIUM, or the `chromium` on the PATH."""
    name = os.environ.get("CHROMIUM") or "chromium"
    return shutil.which(name) or missing(f"the browser {name}")


@contextlib.contextmanager
def small_file_system(place: Path, size: str) -> Iterator[None]:
    """A file system of its own in the new directory `place`, with room for `size`, as "100k"."""
    if os.getuid() != 0:
        missing("root, to mount a small file system")
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        missing("the right to mount a small file system")
    try:
        yield
    finally:
        # Also where a process that was killed has not let go of its files yet.
        subprocess.run(["umount", "-l", str(place)], check=True)


def preloaded(source: str, directory: Path) -> Path:
    """The library that the C file `source` of this directory makes, for LD_PRELOAD."""
    compiler = shutil.which("cc") or missing("a C compiler, cc")
    library = (directory / source).with_suffix(".so")
    path = Path(__file__).with_name(source)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, path, "-ldl"], check=True)
    return library
