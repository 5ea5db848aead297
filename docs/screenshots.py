"""Takes the pictures of the report and of the explorer that the docs show: `make screenshots`.

Real pages of the two demo runs (`make demo`), in headless Chromium.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from collector.look.explore import serving
from collector.look.report import write
from tests.helpers.browser import launched, window

if TYPE_CHECKING:
    from tests.helpers.browser import Browser

RUN, UNTRAINED = "runs/demo", "runs/demo-random"
LABELS = ("eng_Latn", "deu_Latn", "rus_Cyrl", "heb_Hebr", "kor_Hang", "jpn_Jpan")


def report(browser: Browser, folder: Path) -> None:
    """Who uses which experts, below the slider; and how alike languages are."""
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch, "report.html")
        write(RUN, page, compare=UNTRAINED, labels=LABELS)
        browser.prefer("light")
        browser.page.set_viewport_size({"width": 1280, "height": 1080})
        browser.open(page)
        browser.page.wait_for_selector("html[data-drawn='light'][data-layer]", timeout=60_000)
        for figure, name in (("specialization", "report"), ("overlap", "report-overlap")):
            browser.page.evaluate("name => document.getElementById(name).scrollIntoView()", figure)
            browser.page.screenshot(path=folder / f"{name}.png", clip={"x": 70, "y": 0, "width": 1120, "height": 1060})


def explorer(browser: Browser, folder: Path) -> None:
    """An English document by its experts, with one token told in full."""
    with serving.served(RUN) as (url, _):
        browser.prefer("light")
        browser.open(f"{url}&language=eng_Latn&layer=4&where=tokens+%3E+70")
        browser.page.locator("[data-part=card] h2").wait_for(timeout=60_000)
        browser.page.locator(".tokens button").nth(9).hover()
        browser.page.get_by_role("tooltip").wait_for()
        browser.page.screenshot(path=folder / "explorer.png", clip={"x": 90, "y": 40, "width": 1100, "height": 720})


def main(folder: Path) -> None:
    """Writes the pictures."""
    with launched() as chromium:
        for take in (report, explorer):
            with window(chromium) as browser:
                take(browser, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
