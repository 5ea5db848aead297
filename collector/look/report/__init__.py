"""Writes the report of a run: one HTML page, and the same figures for a paper.

`write` opens the runs, `languages`, `experts` and `vocabulary` define the figures and run the queries, `charts` and
`curves` draw, `page` and `export` write files. `write_sweep` and `training` do the same for the checkpoints of a sweep.
No metric is computed here: a figure shows the answer of a query or an inference about it, filtered, ordered and
rounded.
"""

from collector.look.report.over_training import write_sweep
from collector.look.report.writing import write

__all__ = ["write", "write_sweep"]
