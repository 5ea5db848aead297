"""A run to look at: one HTML page, and the same figures for a paper.

`write` opens the runs, `languages` and `experts` say which figures there are and ask the queries, `charts` draws,
`page` and `export` write. No number is computed here: what a figure shows is a query's answer or an inference about it,
chosen, ordered and rounded.
"""

from collector.look.report.writing import write

__all__ = ["write"]
