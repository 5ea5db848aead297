"""Makes a plan of some documents of another plan, or of the same documents in other shards."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

from collector.data.plan.frozen import Plan, Shard

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartOf:
    """Documents of a run, to collect once more."""

    plan: Plan
    """Of the run."""
    rows: Mapping[int, Collection[int]] | None = None
    """Shard of that plan -> numbers of the rows to read; None for all."""
    told: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the new run's settings say about it."""


def narrow(
    plan: Plan, config: Mapping[str, Any], every: int, rows: Mapping[int, Collection[int]] | None = None
) -> Plan:  # fmt: skip
    """Returns a plan of the same sources that reads only some rows.

    Args:
        plan: the other plan.
        config: the settings of the new one.
        every: documents per shard at most.
        rows: shard of the other plan -> numbers of the rows to read (default: all rows of all shards).

    Raises:
        ValueError: no row is left.
    """
    if rows is None and every >= max(shard.planned for shard in plan.shards):
        return dataclasses.replace(plan, config=config)
    shards = (dataclasses.replace(each, shard=number) for number, each in enumerate(_cut(plan, rows, every)))
    made = Plan(shards=tuple(shards), config=config, sources=plan.sources)
    if not made.shards:
        raise ValueError("no document is selected")
    return made


def _cut(plan: Plan, rows: Mapping[int, Collection[int]] | None, every: int) -> Iterator[Shard]:
    """Groups the selected rows of each source; reading starts where the shard of the first one does.

    All rows stay in shards of their own, because one of them may stand for the damaged rest of a file.
    """

    def together_with(shard: Shard) -> tuple[object, ...]:
        return shard.source, shard.kind, shard.options, shard.shard if rows is None else None

    for _, own in itertools.groupby(plan.shards, together_with):
        selected = ((shard, row) for shard in own for row in _rows(shard, rows))
        while together := list(itertools.islice(selected, every)):
            first, keep = together[0][0], tuple(row for _, row in together)
            count = keep[-1] + 1 - first.first_row
            yield dataclasses.replace(first, rows=count, keep=None if len(keep) == count else keep)


def _rows(shard: Shard, rows: Mapping[int, Collection[int]] | None) -> Collection[int]:
    if rows is not None:
        return sorted(rows.get(shard.shard, ()))
    return range(shard.first_row, shard.first_row + shard.rows) if shard.keep is None else shard.keep
