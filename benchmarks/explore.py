"""Measures the latency of the explorer, from an action in the browser until each part of the page has changed.

    python -m benchmarks.explore                    # ten million generated tokens, with a rollup
    python -m benchmarks.explore --run runs/demo

It uses headless Chromium (Debian's) and a server of `collector explore`, and prints the median of several steps after
one warm-up step.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from benchmarks.generated import generated
from collector.look.explore import serving
from collector.query.rollup import files, making
from collector.store.run_directory import RunDirectory
from tests.helpers.browser import launched, window

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PARTS = ("experts", "tokens", "card")
_WATCH = """
(element, part) => new MutationObserver(() => { window.changed[part] = performance.now() - window.started; })
    .observe(element, {childList: true})
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure steps in the explorer."""

    run: Path | None = None
    """Run to explore (default: a generated one)."""
    folder: Path = Path("runs/generated")
    """Folder of the generated runs; a missing one is created."""
    tokens: int = 10_000_000
    """Tokens of the generated run."""
    steps: int = 5
    """Measured steps of each kind."""


def prepared(bench: Bench) -> str:
    """Returns the run directory, after making a rollup if necessary."""
    root = str(bench.run) if bench.run else generated(bench.folder, bench.tokens)
    run = RunDirectory(root)
    if not files.current(run):
        making.make(run)
    return root


def milliseconds(page: Any, act: Callable[[], object], parts: Sequence[str]) -> dict[str, float]:
    """Returns the time from the action until each part has changed."""
    page.evaluate("window.changed = {}; window.started = performance.now()")
    act()
    page.wait_for_function(f"{list(parts)}.every(part => part in window.changed)", timeout=60_000)
    page.wait_for_timeout(500)  # for later updates of the same step
    return page.evaluate("window.changed")


def main(bench: Bench) -> None:
    """Prints the median of each kind of step."""
    root = prepared(bench)
    print(f"load average when it began: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    with serving.served(root) as (url, _), launched() as chromium, window(chromium) as browser:
        browser.open(url)
        page = browser.page
        page.locator("[data-part=card] h2").wait_for(timeout=60_000)
        page.evaluate("window.changed = {}")
        for part in PARTS:
            page.locator(f"[data-part={part}]").evaluate(_WATCH, part)
        slider, languages = page.get_by_role("slider"), page.locator("select").first
        experts = page.get_by_role("group", name="Experts", exact=True).get_by_role("button")
        names = [name for name in languages.locator("option").all_inner_texts() if name.strip()]
        kinds: dict[str, tuple[Callable[[int], object], tuple[str, ...]]] = {
            "layer": (lambda i: slider.press(("ArrowRight", "ArrowLeft")[i % 2]), PARTS),
            "language": (lambda i: languages.select_option(label=names[5 + i % 2]), PARTS),
            "expert": (lambda i: experts.nth(10 + i).click(), ("card",)),
        }
        print(f"\n| step | {' | '.join(f'{part}, ms' for part in PARTS)} |\n|---|{'---|' * len(PARTS)}")
        for kind, (act, parts) in kinds.items():
            taken = [milliseconds(page, functools.partial(act, i), parts) for i in range(bench.steps + 1)][1:]
            cells = (f"{statistics.median(one[part] for one in taken):.0f}" if part in parts else "–" for part in PARTS)
            print(f"| {kind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Bench))
