"""Progress of a collection: a live bar on a terminal, a plain line every few seconds elsewhere.

Shows shards, documents, tokens, tokens per second and ETA of this launch, and padding efficiency
(real tokens / tokens that went through the model). Writes to standard error only.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn

if TYPE_CHECKING:
    from types import TracebackType

    from collector.storage import Commit

PLAIN_EVERY = 5.0
"""Seconds between two plain lines."""


@dataclasses.dataclass(kw_only=True)
class Tally:
    """What is done, and how fast this launch does it."""

    shards: int
    """Shards of the plan."""
    documents: int
    """Rows of the plan that become documents if they are readable."""
    shards_done: int = 0
    shards_failed: int = 0
    rows_done: int = 0
    """Rows of the plan that are behind us: documents and skipped rows."""
    tokens: int = 0
    padded_tokens: int = 0
    launch_rows: int = 0
    launch_tokens: int = 0
    started: float = dataclasses.field(default_factory=time.monotonic)

    def add(self, commit: Commit, *, before: bool = False) -> None:
        """Counts a committed shard; `before`: it was there when this launch began."""
        rows = commit.documents + sum(skipped.count for skipped in commit.skipped.values())
        self.shards_done += 1
        self.rows_done += rows
        self.tokens += commit.tokens
        self.padded_tokens += commit.padded_tokens
        if not before:
            self.launch_rows += rows
            self.launch_tokens += commit.tokens

    def line(self) -> str:
        """One line for people."""
        elapsed = max(time.monotonic() - self.started, 1e-9)
        parts = [
            f"shards {self.shards_done}/{self.shards}",
            f"documents {self.rows_done:,}/{self.documents:,}",
            f"tokens {self.tokens:,}",
            f"{self.launch_tokens / elapsed:,.0f} tokens/s",
            f"padding efficiency {self.tokens / max(1, self.padded_tokens):.2f}",
        ]
        if self.shards_failed:
            parts.append(f"failed {self.shards_failed}")
        if self.launch_rows:
            left = (self.documents - self.rows_done) * elapsed / self.launch_rows
            parts.append(f"ETA {_clock(left)}")
        return " · ".join(parts)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class ProgressView:
    """Context manager that shows a tally; call `tick` often, it decides what to print."""

    def __init__(self, tally: Tally, console: Console | None = None) -> None:
        self.tally = tally
        self.console = console or Console(file=sys.stderr, highlight=False)
        self.note = "starting replicas"
        self._bar = Progress(BarColumn(bar_width=30), TextColumn("{task.fields[line]}"), console=self.console)
        self._task = self._bar.add_task("", total=max(1, tally.documents), line="")
        self._live = Live(self._bar, console=self.console, refresh_per_second=4) if self.console.is_terminal else None
        self._next_line = time.monotonic() + PLAIN_EVERY

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        self.tick()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
        else:
            self._print()

    def tick(self) -> None:
        """Brings the view up to date."""
        if self._live:
            self._bar.update(self._task, completed=self.tally.rows_done, line=self._line())
        elif time.monotonic() >= self._next_line:
            self._print()

    def say(self, message: str) -> None:
        """Prints a message that stays."""
        self.console.print(message, markup=False)

    def _line(self) -> str:
        return self.tally.line() + (f" · {self.note}" if self.note else "")

    def _print(self) -> None:
        self._next_line = time.monotonic() + PLAIN_EVERY
        self.console.print(self._line(), markup=False, soft_wrap=True)
