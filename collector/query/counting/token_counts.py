"""Computes the rows of the macro `token_counts`: how each router treated each token id.

Memory: four bytes for each token of the run, 16 while ids are numbered; for one router at a time, four for each id and
expert, twice if the query reads `top1`; and six, or ten, for each id and expert that was chosen for it, of all routers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from collector.query.numbering import Places

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from collector.query.counting.rows import Asked
    from collector.store.tables import Layer

_LISTS = {"experts": pa.uint16(), "picks": pa.uint32(), "top1": pa.uint32()}
_SCHEMA = pa.schema(
    [("stack", pa.string()), ("layer", pa.uint8()), ("token_id", pa.uint32()), ("tokens", pa.int64())]
    + [(name, pa.list_(kind)) for name, kind in _LISTS.items()]
)
_NO_ID = 2**32 - 1
_CELLS = 2**20
"""Cells that are turned into lists at a time."""


def rows(asked: Asked) -> pa.Table:
    """Counts the token ids of each router. Axes: V ids that occur in the run, E experts, N tokens."""
    places = Places.of_run(asked.cursor)
    known = asked.cursor.sql("select shard, tok, token_id from tokens where token_id is not null")
    id_n = places.column(known, np.uint32, _NO_ID)
    id_v = np.unique(id_n)
    number_n = np.searchsorted(id_v, id_n).astype(np.uint32)
    id_v = id_v[id_v != _NO_ID]  # the last one, if any; its number is then V
    del id_n
    reads_top1 = "top1" in asked.query.sql
    tables = [_SCHEMA.empty_table()]
    for router in asked.routers:
        counts = _Counts(len(id_v), router.n_experts)
        for batch in asked.batches(router, ["shard", "tok"], weights=reads_top1 and asked.has_weights):
            number_t = number_n[places.of(*batch.columns)]
            counts.add(number_t, batch.experts_kt, batch.highest() if batch.weights_kt else None)
        tables += [
            _table(router, id_v, counts, numbers, reads_top1=reads_top1)
            for numbers in _parts(len(id_v), router.n_experts)
        ]
    return pa.concat_tables(tables)


class _Counts:
    """Counts of one router. The row after the last id counts tokens without one."""

    def __init__(self, ids: int, experts: int) -> None:
        self.tokens_v = np.zeros(ids + 1, np.int64)
        # Zeros take no memory before something is added to them.
        self._picks, self._top1 = (np.zeros((ids + 1) * experts, np.uint32) for _ in range(2))
        self.picks_ve, self.top1_ve = (flat.reshape(-1, experts) for flat in (self._picks, self._top1))

    def add(self, number_t: NDArray, experts_kt: Sequence[NDArray], top_t: NDArray | None) -> None:
        self.tokens_v += np.bincount(number_t, minlength=len(self.tokens_v))
        start_t, one = number_t.astype(np.int64) * self.picks_ve.shape[1], np.uint32(1)
        for expert_t in experts_kt:
            np.add.at(self._picks, start_t + expert_t, one)
        if top_t is not None:
            np.add.at(self._top1, start_t + top_t, one)


def _parts(ids: int, experts: int) -> Iterator[slice]:
    step = max(1, _CELLS // experts)
    for first in range(0, ids, step):
        yield slice(first, min(first + step, ids))


def _table(router: Layer, id_v: NDArray, counts: _Counts, numbers: slice, *, reads_top1: bool) -> pa.Table:
    """Returns the rows of some ids."""
    tokens_v = counts.tokens_v[numbers]
    occurring = np.flatnonzero(tokens_v)
    picks_ve = counts.picks_ve[numbers][occurring]
    number, expert = np.nonzero(picks_ve)
    starts = np.append(0, np.cumsum(np.bincount(number, minlength=len(occurring))))
    values: dict[str, NDArray] = {"experts": expert, "picks": picks_ve[number, expert]}
    if reads_top1:
        values["top1"] = counts.top1_ve[numbers][occurring[number], expert]
    columns: dict[str, pa.Array] = {
        "stack": pa.array([router.stack], pa.string()).take(pa.array(np.zeros(len(occurring), np.int8))),
        "layer": pa.array(np.full(len(occurring), router.layer, np.uint8)),
        "token_id": pa.array(id_v[numbers][occurring]), "tokens": pa.array(tokens_v[occurring]),
    }  # fmt: skip
    for name, kind in _LISTS.items():
        if name in values:
            entries = pa.array(values[name].astype(kind.to_pandas_dtype()))
            columns[name] = pa.ListArray.from_arrays(pa.array(starts.astype(np.int32)), entries)
        else:
            columns[name] = pa.nulls(len(occurring), pa.list_(kind))
    return pa.table(columns, schema=_SCHEMA)
