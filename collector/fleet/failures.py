"""Counts the failed attempts at each shard over all launches, and decides when a shard is left out."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection

    from collector.data.plan import Shard
    from collector.fleet.events import Died, Failed
    from collector.store.run_directory import RunDirectory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """A failed attempt at a shard."""

    number: int
    """Its number, from 1."""
    limit: int
    """The attempts that the shard has."""
    reason: str
    """Type and message of the error."""

    @property
    def is_last(self) -> bool:
        """Whether the shard is left out from now on."""
        return self.number >= self.limit


class Failures:
    """The failures of a run's shards that are still to do."""

    def __init__(
        self, run: RunDirectory, max_attempts: int, *, committed: Collection[int] = (), retry_failed: bool = False
    ) -> None:
        """Reads what failed in earlier launches.

        Args:
            run: the run directory.
            max_attempts: attempts per shard, over all launches.
            committed: shards that are done; a driver may have ended between a commit and forgetting the failure.
            retry_failed: whether shards that were left out get as many attempts again.
        """
        self._run = run
        self._max_attempts = max_attempts
        found = run.failures()
        for shard in found.keys() & set(committed):
            run.clear_failure(shard)
        found = {shard: failure for shard, failure in sorted(found.items()) if shard not in committed}
        left_out = {shard: failure for shard, failure in found.items() if failure.get("left_out")}
        self.attempts = {shard: int(failure["attempts"]) for shard, failure in found.items()}
        """Shard -> failed attempts."""
        self.left_out: dict[int, dict[str, Any]] = {} if retry_failed else left_out
        """Shard -> its last failure, of the shards that earlier launches left out and this one does not try."""
        self._forgiven = {shard: self.attempts[shard] for shard in left_out} if retry_failed else {}

    def record(self, shard: Shard, event: Failed | Died, node: str) -> Attempt:
        """Counts an attempt against a shard, and notes in the run directory why it failed."""
        attempt = Attempt(
            number=self.attempts.get(shard.shard, 0) + 1,
            limit=self._forgiven.get(shard.shard, 0) + self._max_attempts,
            reason=f"{type(event.error).__name__}: {event.error}",
        )
        self.attempts[shard.shard] = attempt.number
        failure = {
            "shard": shard.shard,
            "source": shard.source,
            "first_row": shard.first_row,
            "rows": shard.rows,
            "attempts": attempt.number,
            "left_out": attempt.is_last,
            "error": attempt.reason,
            "traceback": event.trace,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "node": node,
        }
        self._run.record_failure(shard.shard, failure)
        return attempt

    def forget(self, shard: int) -> None:
        """Drops the failures of a shard that is committed."""
        if self.attempts.pop(shard, None) is not None:
            self._run.clear_failure(shard)
