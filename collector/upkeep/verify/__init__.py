"""Re-reads everything that a run committed, and reports everything that is wrong.

For every shard of the plan it checks the commit record, the files with their sizes and SHA-256, the row counts in
their footers, and the contents of the tables (`tables`, `routing`). For the run it checks that run.json belongs to this
plan, that the vocabulary can be read, that `_SUCCESS` and the manifest are true, and that a current rollup agrees with
the tables. A run that lacks shards is incomplete; one with anything wrong is unsound.

Guarantees: only the plan is trusted; a few shards are processed at once, each by row groups, so memory does not grow
with the run; a remote file is fetched once, to a temporary folder. Nothing is written, except that `recollect` sets
wrong shards aside. Whether the experts of a token are the right ones is not checked, because only the model knows.
"""

from __future__ import annotations

from collector.upkeep.verify.report import Report, Ticker
from collector.upkeep.verify.run import recollect, verify

__all__ = ["Report", "Ticker", "recollect", "verify"]
