"""Numbers the labels and the tokens of a run, so that what is recorded of each can be counted and scattered in arrays.

A token's place is its number among all tokens of the shards in question, in the order in which they are recorded:
those of an encoder before the decoder's in each shard. Rows may then come in any order, and not every token needs to
have one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    import duckdb
    from numpy.typing import NDArray

LABEL_PLACES = "(select unnest($names) as label, unnest(range(1, len($names) + 1))::uinteger as place)"
"""The number of each label, to be joined: a search in the list would take as long as there are labels, for every row.
"""
_BATCH = 40_000
"""Rows of a batch, so that its arrays fit the processor's cache."""


def recorded_labels(cursor: duckdb.DuckDBPyConnection) -> list[str]:
    """Returns the labels of rows: those of the run, and the sets that documents with several are recorded by."""
    recorded = "select label from labels union select label_set from label_sets order by 1"
    return [name for (name,) in cursor.execute(recorded).fetchall()]


class Places:
    """The places of the tokens of some shards. S shards, N tokens, T rows of a batch."""

    def __init__(self, shard_s: NDArray[np.integer], tokens_s: NDArray[np.integer]) -> None:
        """Numbers the tokens of shards, which are in ascending order."""
        self.tokens = int(tokens_s.sum())
        """N, rows of the arrays; more than there are tokens if some numbers are not used."""
        self.ends = np.cumsum(tokens_s) - 1
        """The last place of each shard, [S]."""
        self._first = np.zeros(int(shard_s.max(initial=-1)) + 1, np.int64)  # by the shard's number
        self._first[shard_s] = self.ends + 1 - tokens_s

    @classmethod
    def of_run(cls, cursor: duckdb.DuckDBPyConnection) -> Places:
        """Numbers the tokens of all shards."""
        return cls(*shards(cursor))

    def of(self, shard_t: NDArray, tok_t: NDArray) -> NDArray[np.int64]:
        """Returns the places of tokens, [T]."""
        return self._first[shard_t] + tok_t

    def batches(self, rows: duckdb.DuckDBPyRelation) -> Iterator[tuple[NDArray[np.int64], list[NDArray]]]:
        """Yields the places of rows, which begin with shard and tok and have no nulls, and their other columns."""
        for batch in rows.to_arrow_reader(_BATCH):
            shard_t, tok_t, *others = map(np.from_dlpack, batch.columns)  # to_numpy would import pandas
            yield self.of(shard_t, tok_t), others

    def column(
        self, rows: duckdb.DuckDBPyRelation, dtype: type[np.int32 | np.int64 | np.uint16 | np.uint32], missing: int
    ) -> NDArray[Any]:
        """Returns by place the third column of rows, [N], and `missing` where there is no row."""
        value_n = np.full(self.tokens, missing, dtype)
        for place_t, (value_t,) in self.batches(rows):
            value_n[place_t] = value_t
        return value_n


def shards(cursor: duckdb.DuckDBPyConnection) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the numbers of the shards, ascending, and how many tokens each has, [S] both."""
    counted = cursor.sql(
        "select shard::bigint as shard, max(tok)::bigint + 1 as tokens from tokens group by shard order by shard"
    ).fetchnumpy()
    return counted["shard"], counted["tokens"]
