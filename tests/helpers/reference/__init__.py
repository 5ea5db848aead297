"""The queries once more, in numpy and from their definitions, to compare with the SQL.

One module per family; `base` reads the shards of a run. Every function gives
{keys of a row: (value, baseline, n, …)}.
"""
