"""Formats the findings of a verification for people, and its progress."""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_LINES_PER_SHARD = 5


@dataclasses.dataclass(kw_only=True)
class Report:
    """The findings of a verification."""

    shards: int
    """Number of shards in the plan."""
    missing: list[int] = dataclasses.field(default_factory=list)
    """Shards without a commit record."""
    wrong: dict[int, list[str]] = dataclasses.field(default_factory=dict)
    """Problems by committed shard."""
    run: list[str] = dataclasses.field(default_factory=list)
    """Problems of the run's own files."""
    rollup: list[str] | None = None
    """Problems of the rollup; None without a current one."""
    empty: bool = False
    """Whether the committed shards are right, but hold no document."""

    @property
    def sound(self) -> bool:
        """Whether everything that exists is right."""
        return not self.wrong and not self.run and not self.rollup

    @property
    def complete(self) -> bool:
        """Whether every shard is committed."""
        return not self.missing

    def lines(self) -> Iterator[str]:
        """Yields the findings, one line each, and the verdict."""
        yield from self.run
        for shard, found in sorted(self.wrong.items()):
            yield from (f"shard {shard}: {what}" for what in found[:_LINES_PER_SHARD])
            if len(found) > _LINES_PER_SHARD:
                yield f"shard {shard}: and {len(found) - _LINES_PER_SHARD} more"
        yield from self.rollup or ()
        checked = self.shards - len(self.missing)
        if not self.sound:
            also = ", and so is the rollup: `collector rollup RUN --again` counts again" if self.rollup else ""
            yield f"unsound: {len(self.wrong):,} of {checked:,} committed shards are wrong{also}"
        if self.missing:
            named = ", ".join(map(str, self.missing[:10])) + (" …" if len(self.missing) > 10 else "")
            yield f"incomplete: {len(self.missing):,} of {self.shards:,} shards are not committed ({named})"
        if self.sound:
            also = ", and so is the rollup" if self.rollup is not None else ""
            but = ", but they hold no document: every row was rejected" if self.empty else ""
            yield f"sound: all of {checked:,} committed shards are correct{also}{but}"


class Ticker:
    """Shows progress on standard error: updated in place in a terminal, otherwise one line a minute."""

    def __init__(self, done: str = "verified", what: str = "shards") -> None:
        self._done, self._what = done, what
        self._terminal = sys.stderr.isatty()
        self._told = time.monotonic()

    def __call__(self, done: int, of: int) -> None:
        """Shows that `done` of `of` are done, unless the last update is too recent."""
        now = time.monotonic()
        if now - self._told < (0.2 if self._terminal else 60) and not (self._terminal and done == of):
            return
        self._told = now
        line = f"{self._done} {done:,}/{of:,} {self._what}"
        sys.stderr.write(f"\r{line}" + ("\n" if done == of else "") if self._terminal else f"{line}\n")
        sys.stderr.flush()
