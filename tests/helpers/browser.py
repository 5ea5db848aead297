"""A real browser for tests: headless Chromium, driven by playwright, with axe-core to find barriers.

    def test_page(browser):
        browser.open(path_or_url)
        browser.page.locator("figure svg").first.wait_for()      # playwright's page, which waits by itself
        browser.page.locator("#layer").press("ArrowRight")
        assert browser.requests() == []                          # or all to the server under test
        assert browser.errors == []
        assert browser.barriers() == []                          # serious and critical ones
        browser.screenshot("page-light")                         # kept in $SCREENSHOTS, if that is set

Guarantees: every test has a window of its own, with an empty profile; nothing is fetched but what the page asks for.
Where Chromium is missing, tests that use the fixture are skipped and say how to install it.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

INSTALL = "no Chromium on the PATH: apt-get install chromium (Debian), or set CHROMIUM to the program"
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
_LOCAL = ("file:", "data:", "blob:", "about:")


class Browser:
    """One window of Chromium."""

    def __init__(self, page: Any) -> None:
        self.page = page
        """playwright's."""
        self.errors: list[str] = []
        """Errors and warnings of the console, and exceptions that nothing caught."""
        self._requested: list[str] = []
        page.on("console", lambda said: self.errors.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self._requested.append(request.url))
        page.on("websocket", lambda socket: self._requested.append(socket.url))

    def open(self, where: str | Path) -> None:
        """Loads a file or a URL."""
        self.page.goto(where.absolute().as_uri() if isinstance(where, Path) else where)

    def prefer(self, scheme: str) -> None:
        """Asks for the `light` or `dark` scheme, as the system's settings do."""
        self.page.emulate_media(color_scheme=scheme)

    def requests(self) -> list[str]:
        """What the page asked a network for, sockets included."""
        return [url for url in self._requested if not url.startswith(_LOCAL)]

    def barriers(self) -> list[str]:
        """What axe-core finds to be a serious or critical barrier: rule, help and the elements."""
        self.page.evaluate(_axe())
        found = self.page.evaluate("axe.run(document, {resultTypes: ['violations']}).then(r => r.violations)")
        return [
            f"{each['id']} ({each['impact']}): {each['help']}: {[node['html'][:200] for node in each['nodes'][:5]]}"
            for each in found
            if each["impact"] in ("serious", "critical")
        ]

    def screenshot(self, name: str, *, whole: bool = False) -> None:
        """Takes the window, or the whole page, and keeps it as a PNG in the folder $SCREENSHOTS where there is one."""
        png = self.page.screenshot(full_page=whole)
        assert png.startswith(b"\x89PNG")
        if folder := os.environ.get("SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            Path(folder, f"{name}.png").write_bytes(png)


@contextlib.contextmanager
def launched() -> Iterator[Any]:
    """The program, for as long as the context.

    Raises:
        FileNotFoundError: there is none.
    """
    program = shutil.which(os.environ.get("CHROMIUM", "chromium"))
    if program is None:
        raise FileNotFoundError(INSTALL)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Not --headless twice: playwright's own is the old mode, which Debian's Chromium lacks.
        started = playwright.chromium.launch(executable_path=program, headless=False, args=list(FLAGS))
        yield started
        started.close()


@contextlib.contextmanager
def window(chromium: Any) -> Iterator[Browser]:
    """A fresh window: no cookies, no storage, no history."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    yield Browser(context.new_page())
    context.close()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The program, started once; skips where there is none."""
    try:
        with launched() as started:
            yield started
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture
def browser(chromium: Any) -> Iterator[Browser]:
    """A window for one test."""
    with window(chromium) as opened:
        yield opened


def _axe() -> str:
    return importlib.resources.files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
