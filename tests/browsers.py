"""Chromium for tests, through playwright."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from parts import chromium, missing

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WITHIN = 30_000  # milliseconds for what is waited for


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = chromium()
    try:
        from playwright.sync_api import expect, sync_playwright
    except ImportError:
        missing("playwright")
    expect.set_options(timeout=WITHIN)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context()
    context.set_default_timeout(WITHIN)
    yield context
    context.close()


@pytest.fixture
def errors(context: BrowserContext) -> list[str]:
    """What the pages of the context complain about."""
    errors: list[str] = []
    context.on("weberror", lambda error: errors.append(str(error.error)))
    context.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    return errors
