"""Numbers the tokens of a run, so that what is recorded of each can be scattered into arrays in the run's order.

A token's place is its number among all tokens of the shards in question, those of an encoder before the decoder's in
each shard. Rows may then come in any order, and not every token needs to have one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    import duckdb
    from numpy.typing import NDArray

_BATCH = 100_000
"""Rows of a batch."""


class Places:
    """The places of the tokens of some shards. S shards, T tokens."""

    def __init__(self, shard_S: NDArray[np.integer], tokens_S: NDArray[np.integer]) -> None:
        """Numbers the tokens of shards, which are in ascending order."""
        self._shard_S, self._first_S = shard_S, np.cumsum(tokens_S) - tokens_S
        self.tokens = int(tokens_S.sum())
        """T, rows of the arrays."""

    @classmethod
    def of_run(cls, cursor: duckdb.DuckDBPyConnection) -> Places:
        """Numbers the tokens of all shards."""
        return cls(*shards(cursor))

    def batches(self, rows: duckdb.DuckDBPyRelation) -> Iterator[tuple[NDArray[np.int64], list[NDArray]]]:
        """Yields the places of rows, which begin with shard and tok and have no nulls, and their other columns."""
        for batch in rows.to_arrow_reader(_BATCH):
            shard_t, tok_t, *others = map(np.from_dlpack, batch.columns)  # to_numpy would import pandas
            yield self._first_S[np.searchsorted(self._shard_S, shard_t)] + tok_t, others

    def column(
        self, rows: duckdb.DuckDBPyRelation, dtype: type[np.int32 | np.int64 | np.uint16], missing: int
    ) -> NDArray[Any]:
        """Returns by place the third column of rows, [T], and `missing` where there is no row."""
        value_T = np.full(self.tokens, missing, dtype)
        for place_t, (value_t,) in self.batches(rows):
            value_T[place_t] = value_t
        return value_T


def shards(cursor: duckdb.DuckDBPyConnection) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the numbers of the shards, ascending, and how many tokens each has, [S] both."""
    counted = cursor.sql(
        "select shard::bigint as shard, max(tok)::bigint + 1 as tokens from tokens group by shard order by shard"
    ).fetchnumpy()
    return counted["shard"], counted["tokens"]
