"""Sums over the commit records of a run, and which shards failed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collector.store.run_directory import Commit, RunDirectory

_SUMMED = ("documents", "tokens", "rows", "characters", "truncated", "padded_tokens", "halved")


@dataclasses.dataclass(kw_only=True)
class Totals:
    """Sums over all committed shards."""

    committed: set[int] = dataclasses.field(default_factory=set)
    """Numbers of the shards."""
    documents: int = 0
    tokens: int = 0
    rows: int = 0
    characters: int = 0
    truncated: int = 0
    padded_tokens: int = 0
    halved: int = 0
    bytes: int = 0
    seconds: Counter[str] = dataclasses.field(default_factory=Counter)
    nodes: set[str] = dataclasses.field(default_factory=set)
    skipped: Counter[str] = dataclasses.field(default_factory=Counter)
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, run: RunDirectory) -> Totals:
        """Reads all commit records."""
        totals = cls()
        for commit in run.commits():
            totals.add(commit)
        return totals

    def add(self, commit: Commit) -> None:
        """Adds a shard."""
        self.committed.add(commit.shard)
        for name in _SUMMED:
            setattr(self, name, getattr(self, name) + getattr(commit, name))
        self.bytes += sum(part.bytes for part in commit.files.values())
        self.seconds.update(commit.seconds)
        self.nodes.add(commit.node)
        for reason, skipped in commit.skipped.items():
            self.skipped[reason] += skipped.count
            self.examples.setdefault(reason, []).extend(skipped.examples)

    def refresh(self, run: RunDirectory) -> None:
        """Adds the shards that were committed since, reading only their records."""
        for shard in sorted(run.committed_shards() - self.committed):
            commit = run.read_commit(shard)
            if commit is not None:
                self.add(commit)

    def failures(self, run: RunDirectory) -> dict[int, dict[str, Any]]:
        """Shard -> why its last attempt failed, for shards that are still not committed."""
        found = run.failures()
        return {shard: found[shard] for shard in sorted(found.keys() - self.committed)}

    @property
    def padding_efficiency(self) -> float:
        """Real tokens / tokens that went through the model."""
        return self.tokens / max(1, self.padded_tokens)

    @property
    def replica_hours(self) -> float:
        """Hours in which a replica's device computed or waited; of runs without idle times, the time of all stages."""
        if "idle" in self.seconds:
            return (self.seconds["forward"] + self.seconds["idle"]) / 3600
        return sum(self.seconds.values()) / 3600
