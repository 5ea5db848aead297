"""Re-reads everything that a run committed, and says what of it is not what it must be.

Of every shard of the plan: its commit record, its files with their sizes and SHA-256, the rows of their footers, and
what the tables hold (`contents`). Of the run: that run.json is of this plan, that the vocabulary can be read, that the
marks of completeness say the truth, and that a current rollup counts what the tables hold. A run that lacks shards is
incomplete; one that has something wrong is unsound.

Guarantees: nothing is trusted but the plan; a few shards are in work at once, each by row groups, so memory does not
grow with the run; a remote file is fetched once, to a temporary folder. Nothing is written, until `recollect` is asked
to set wrong shards aside. What a token's experts should have been is not known here: that only the model can tell.
"""

from __future__ import annotations

from collector.upkeep.verify.report import Report, Ticker
from collector.upkeep.verify.run import recollect, verify

__all__ = ["Report", "Ticker", "recollect", "verify"]
