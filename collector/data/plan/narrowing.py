"""Makes a plan of some documents of another plan."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

from collector.data.plan.frozen import Plan, Shard

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping


def narrow(
    plan: Plan, config: Mapping[str, Any], rows: Mapping[int, Collection[int]] | None, every: int
) -> Plan:  # fmt: skip
    """Returns a plan of the same sources that reads only some rows.

    Args:
        plan: the other plan.
        config: the settings of the new one.
        rows: shard of the other plan -> numbers of the rows to read; None for all rows of all shards.
        every: documents per shard; shards of the other plan are put together up to so many.

    Raises:
        ValueError: no row is left.
    """
    if rows is None:
        return dataclasses.replace(plan, config=config)
    if not any(rows.values()):
        raise ValueError("no document is selected")
    shards = (_cut(together, rows) for together in _together(plan, rows, every))
    numbered = (dataclasses.replace(shard, shard=number) for number, shard in enumerate(shards))
    return Plan(shards=tuple(numbered), config=config, sources=plan.sources)


def _together(plan: Plan, rows: Mapping[int, Collection[int]], every: int) -> Iterator[list[Shard]]:
    """Groups shards of one source that have up to `every` selected rows in all."""
    selected = (shard for shard in plan.shards if rows.get(shard.shard))
    for _, own in itertools.groupby(selected, lambda shard: (shard.source, shard.kind, shard.options)):
        group: list[Shard] = []
        count = 0
        for shard in own:
            if group and count + len(rows[shard.shard]) > every:
                yield group
                group, count = [], 0
            group.append(shard)
            count += len(rows[shard.shard])
        yield group


def _cut(together: list[Shard], rows: Mapping[int, Collection[int]]) -> Shard:
    keep = tuple(sorted(row for shard in together for row in rows[shard.shard]))
    count = keep[-1] + 1 - together[0].first_row
    return dataclasses.replace(together[0], rows=count, keep=None if len(keep) == count else keep)
