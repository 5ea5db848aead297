"""Plans a run: decides which rows of which source make up each shard.

Planning scans text files once to find row boundaries, decompresses compressed files once, and reads
only the footer of Parquet files, several files at a time. With `--per-label` or `--limit` it also
reads the rows, with the same readers as the workers, one file after another. The plan contains no text.

Guarantees: the same sources and settings give the same plan, whose hash covers every setting,
source and row number. Every row belongs to exactly one shard (with a selection: every selected row),
including bad rows, which are reported by their shard. A shard lies within one source; if the source
has changed since planning, reading it fails. Where a compressed file is damaged, the rows before the
damage make up shards as usual, and one extra shard of one row represents the rest: it fails with a
message that describes the damage.

`--limit` and `--per-label` count good documents. Bad rows in between are included without counting
towards either limit; once the limit is reached, reading stops.
"""

from __future__ import annotations

from collector.data.plan.frozen import Plan, Shard
from collector.data.plan.making import has_conversations, label_warnings, make_plan
from collector.data.plan.narrowing import PartOf, narrow
from collector.data.plan.reading import check_sources, differences, read_shard

__all__ = [
    "PartOf",
    "Plan",
    "Shard",
    "check_sources",
    "differences",
    "has_conversations",
    "label_warnings",
    "make_plan",
    "narrow",
    "read_shard",
]
