"""A browser for the tests of the page: Debian's chromium, or the one that Playwright brings."""

import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        names = (os.environ.get("SIGHTLINE_CHROMIUM"), shutil.which("chromium"), shutil.which("chromium-browser"), own)
        path = next((name for name in names if name and os.path.exists(name)), None)  # noqa: PTH110
        if path is None:
            pytest.fail(
                "there is no browser to test the page with: `make browser` as root on Debian, `playwright install "
                "chromium`, or a path in SIGHTLINE_CHROMIUM"
            )
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()
