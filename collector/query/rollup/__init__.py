"""The rollup of a run: counts per document and per label, made once, from which most questions are answered.

`files` names them and knows whether there is a current one; `counting` counts one router in one shard; `making` does so
for a whole run. Readers come to it through the views of `warehouse`, and `verify` checks it against the data.
"""
