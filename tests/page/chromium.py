"""The installed headless Chromium, or the reason to skip a test."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, BrowserType, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome")


def launch(kind: BrowserType, *flags: str) -> Browser:
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        pytest.skip("chromium is not installed")
    flags += ("--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
    return kind.launch(executable_path=path, args=flags)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Launch the installed Chromium, or skip the test: without one, Playwright would download it."""
    with sync_playwright() as playwright:
        browser = launch(playwright.chromium)
        yield browser
        browser.close()
