"""Progress of a collection: a live bar on a terminal, a plain line every few seconds elsewhere.

Shows shards, documents, tokens, tokens per second and ETA of this launch, and padding efficiency
(real tokens / tokens that went through the model). On request every message and every line is a
JSON object instead, with `time` (UTC), `event`, and fields of the event's own. Writes to standard
error only. A standard error that cannot be written to does not end a run.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn

from collector.fleet.harmless import Harmless

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from collector.store.run_directory import Commit

PLAIN_EVERY = 5.0
"""Seconds between two plain lines."""


@dataclasses.dataclass(kw_only=True)
class Tally:
    """Counts of the work that is done, and the rate of this launch."""

    shards: int
    """Shards of the plan."""
    documents: int
    """Rows of the plan; each readable row becomes a document."""
    shards_done: int = 0
    shards_failed: int = 0
    rows_done: int = 0
    """Rows of the plan that are done: documents and rejected rows."""
    rejected: Counter[str] = dataclasses.field(default_factory=Counter)
    """Reason -> rows that became no document."""
    tokens: int = 0
    padded_tokens: int = 0
    launch_rows: int = 0
    launch_tokens: int = 0
    started: float = dataclasses.field(default_factory=time.monotonic)

    def add(self, commit: Commit, *, before: bool = False) -> None:
        """Adds a committed shard; `before`: it was committed before this launch."""
        rejected = {reason: skipped.count for reason, skipped in commit.skipped.items()}
        rows = commit.documents + sum(rejected.values())
        self.rejected.update(rejected)
        self.shards_done += 1
        self.rows_done += rows
        self.tokens += commit.tokens
        self.padded_tokens += commit.padded_tokens
        if not before:
            self.launch_rows += rows
            self.launch_tokens += commit.tokens

    def add_unread(self, rows: int) -> None:
        """Adds another driver's shard by its planned rows; its commit record is not read, nor its tokens counted."""
        self.shards_done += 1
        self.rows_done += rows

    @property
    def padding_efficiency(self) -> float:
        """Real tokens / tokens that went through the model."""
        return self.tokens / max(1, self.padded_tokens)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of this launch."""
        return self.launch_tokens / self._elapsed

    @property
    def seconds_left(self) -> float | None:
        """Seconds left at this launch's rate; None while there is no rate."""
        if not self.launch_rows:
            return None
        return max(0.0, (self.documents - self.rows_done) * self._elapsed / self.launch_rows)

    @property
    def _elapsed(self) -> float:
        return max(time.monotonic() - self.started, 1e-9)

    def line(self) -> str:
        """One line for people."""
        parts = [f"shards {self.shards_done}/{self.shards}", f"documents {self.rows_done:,}/{self.documents:,}"]
        if rejected := self.rejected.total():
            parts.append(f"{rejected:,} of them rejected")
        if self.tokens:
            parts += [
                f"tokens {self.tokens:,}",
                f"{self.tokens_per_second:,.0f} tokens/s",
                f"padding efficiency {self.padding_efficiency:.2f}",
            ]
        if self.shards_failed:
            parts.append(f"failed {self.shards_failed}")
        if self.seconds_left is not None:
            parts.append(f"ETA {_clock(self.seconds_left)}")
        return " · ".join(parts)

    def fields(self) -> dict[str, Any]:
        """The same as fields of a JSON object."""
        left = self.seconds_left
        return {
            "shards": self.shards,
            "shards_done": self.shards_done,
            "shards_failed": self.shards_failed,
            "documents": self.documents,
            "documents_done": self.rows_done,
            "rejected": self.rejected.total(),
            "tokens": self.tokens,
            "tokens_per_second": round(self.tokens_per_second, 1),
            "padding_efficiency": round(self.padding_efficiency, 4),
            "seconds_left": None if left is None else round(left, 1),
        }


def shares(seconds: Mapping[str, float]) -> str:
    """One line about which stages of the work took how long, the longest first; empty if nothing was recorded.

    The shares add up to 100 % of the time that the stages took. Stages of different shards overlap, so their times do
    not add up to the duration of the run. How long the device waited is a share of the device's own time.

    Args:
        seconds: stage -> wall time, as commit records hold it; `idle` is how long the device waited for a shard.
    """
    stages = {stage: spent for stage, spent in seconds.items() if stage != "idle"}
    if not (work := sum(stages.values())):
        return ""
    longest = sorted(stages.items(), key=lambda stage: -stage[1])
    line = " · ".join(f"{stage} {100 * spent / work:.1f} %" for stage, spent in longest) + " of the work"
    device = seconds.get("forward", 0.0) + seconds.get("idle", 0.0)
    return (
        f"{line}; the device waited {100 * seconds['idle'] / device:.1f} % of its time" if "idle" in seconds else line
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class PlainConsole(Console):
    """A console without highlighting that leaves a pipe without a reader to the caller.

    Rich would end the process, and a run does not end because nobody reads its messages any more.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, **options)

    def on_broken_pipe(self) -> None:
        """Raises the BrokenPipeError that is being handled."""
        raise


class ProgressView:
    """Context manager that shows a tally. Call `tick` often; it decides when to print. No method raises an error."""

    def __init__(self, tally: Tally, console: Console | None = None, *, as_json: bool = False) -> None:
        self.tally = tally
        self.console = console or PlainConsole(file=sys.stderr)
        self.as_json = as_json
        self.note = "starting replicas"
        self._bar = Progress(BarColumn(bar_width=30), TextColumn("{task.fields[line]}"), console=self.console)
        self._task = self._bar.add_task("", total=max(1, tally.documents), line="")
        live = self.console.is_terminal and not as_json
        self._live = Live(self._bar, console=self.console, refresh_per_second=4) if live else None
        self._next_line = time.monotonic() + PLAIN_EVERY
        self._harmless = Harmless("messages and progress", self._tell)

    def __enter__(self) -> Self:
        with self._harmless:
            if self._live:
                self._live.start()
        self.tick()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._harmless:
            if self._live:
                self._live.stop()
            else:
                self._print()

    def tick(self) -> None:
        """Brings the view up to date."""
        with self._harmless:
            if self._live:
                self._bar.update(self._task, completed=self.tally.rows_done, line=self._line())
            elif time.monotonic() >= self._next_line:
                self._print()

    def say(self, message: str, *, event: str = "message", **fields: Any) -> None:
        """Prints a message that stays.

        Args:
            message: for people.
            event: the kind of event.
            fields: its data, for JSON.
        """
        with self._harmless:
            if self.as_json:
                self._write(json_line(event, message=message, **fields))
            else:
                self.console.print(message, markup=False, soft_wrap=True)

    def _line(self) -> str:
        return self.tally.line() + (f" · {self.note}" if self.note else "")

    def _print(self) -> None:
        self._next_line = time.monotonic() + PLAIN_EVERY
        if self.as_json:
            self._write(json_line("progress", **self.tally.fields(), note=self.note))
        else:
            self.console.print(self._line(), markup=False, soft_wrap=True)

    def _write(self, line: str) -> None:
        """Writes a line as it is, because a console would break long ones."""
        self.console.file.write(line)
        self.console.file.flush()

    def _tell(self, message: str) -> None:
        """Says that this view fails, past the console."""
        sys.stderr.write(json_line("message", message=message) if self.as_json else f"{message}\n")
        sys.stderr.flush()


def tell(message: str, *, as_json: bool, event: str = "message", **fields: Any) -> None:
    """Writes a message to standard error outside of any view; if it cannot be written, nothing."""
    with Harmless("messages", lambda _: None):
        sys.stderr.write(json_line(event, message=message, **fields) if as_json else f"{message}\n")
        sys.stderr.flush()


def json_line(event: str, **fields: Any) -> str:
    """An event as one line of JSON."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return json.dumps({"time": now, "event": event} | fields) + "\n"
