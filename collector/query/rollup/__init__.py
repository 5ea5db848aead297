"""The rollup of a run: counts per document and per label that are computed once and answer most queries.

`files` names its files and tells whether it is current; `counting` counts one router in one shard; `making` makes the
rollup of a whole run. Queries read it through the views of `query.views`, and `upkeep.verify` checks it against the
data.
"""
