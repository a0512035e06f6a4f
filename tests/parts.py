"""Parts of the machine that some tests need and that may be missing."""

import os
import shutil
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
