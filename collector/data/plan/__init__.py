"""The frozen plan of a run: which rows of which source make which shard.

Making it looks once through text files for where rows begin, unpacks compressed ones once, and of
Parquet reads the footer, several files at a time; with `--per-label` or `--limit` it also reads the
rows, through the same readers as the workers do, one file after the other. No text enters the plan.

Guarantees: the same sources and settings give the same plan, whose hash covers every setting,
source and row number. Every row lies in exactly one shard (with a selection: every row taken), and
a bad row like any other, so that the shard which meets it reports it. A shard lies in one source
and is read from there alone; a source that changed since is refused. Where a compressed file is
damaged, the rows before make shards as ever, and one more shard of one row stands for the rest: it
fails with what is wrong.

`--limit` and `--per-label` count good documents. Bad rows in between are taken as well and cost
nothing of either; once the limit is full, reading stops. What becomes of the documents is not known
here.
"""

from __future__ import annotations

from collector.data.plan.frozen import Plan, Shard
from collector.data.plan.making import make_plan
from collector.data.plan.reading import check_sources, differences, read_shard

__all__ = ["Plan", "Shard", "check_sources", "differences", "make_plan", "read_shard"]
