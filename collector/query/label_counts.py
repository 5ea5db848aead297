"""Computes the views `label_tokens` and `label_counts` of a run without a rollup, when a query first needs them.

DuckDB reads the columns and numpy counts them, several times as fast as a `group by` over every pick (docs/queries.md).
The SQL of the two views defines the counts; statements other than queries still read the views themselves.

Guarantees: the counts equal those of the SQL, sums of weights up to the order of addition. A router is counted once,
when a query first asks about it, and its weights when a query first reads them. Memory holds a batch of rows, and a few
numbers per label, router and expert; where labels are thousands, fewer routers are counted at a time.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from collector.query.counting.rows import BATCH, batches, nobody
from collector.query.groupings import reads_of
from collector.query.numbering import recorded_labels
from collector.store import tables

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import duckdb
    from numpy.typing import NDArray

    from collector.query.catalog import Query, Value
    from collector.query.counting.rows import Batch
    from collector.store.tables import Layer

_COUNTED = ("label_tokens", "label_counts")
_OF_WEIGHTS = ("top1", "weight_sum")
"""Columns that need the weights; a statement that names neither does without them."""
_CELL = """
(((layer - $first)::uinteger * (len($names) + 1) + coalesce(place, 0)) * 2 + is_special::uinteger)::uinteger
"""
"""Encodes layer (from the first of them), label (0: none) and whether a token is special as one number, the cell."""
_NAMED = """
cell // 2 // (len($names) + 1) + $first as layer, $names[cell // 2 % (len($names) + 1)] as label,
cell % 2 = 1 as is_special, columns(* exclude (cell))
"""
"""Decodes a cell."""
_ROWS_PER_LABEL = 40
"""Least rows of a batch for each label, so that adding up the cells of a batch costs less than counting its rows."""
_NUMBERS = 2**25
"""Numbers that a pass over the rows may hold (256 MB): one for each cell, expert and sum."""


class LabelCounts:
    """Counts of an opened run by label, in a separate schema next to that of its views."""

    def __init__(
        self, connection: duckdb.DuckDBPyConnection, layers: Sequence[Layer], views: Mapping[str, str], schema: str,
        *, has_weights: bool = True,
    ) -> None:  # fmt: skip
        """Creates empty tables, and the views that read them.

        Args:
            connection: the DuckDB with the views of the run.
            layers: the run's routers.
            views: selects of its derived views by name, each after those that it reads.
            schema: schema of the views.
            has_weights: whether the run has weights; without them top1 and weight_sum are null.
        """
        self._has_weights = has_weights
        self._connection, self._layers = connection, layers
        self._schema, self._own = schema, f"{schema}_counted"
        self._above = _readers(views)
        self._done: dict[bool, set[Layer]] = {False: set(), True: set()}
        """Routers that are counted without and with weights."""
        self._lock = threading.Lock()
        tables = [f"create table {self._own}.{name} as from {schema}.{name} limit 0" for name in _COUNTED]
        above = [f"create view {self._own}.{name} as\n{views[name]}" for name in self._above]
        connection.cursor().execute(";\n".join([f"create schema {self._own}", *tables, self._search(), *above]))

    def _search(self) -> str:
        return f"set search_path = '{self._own},{self._schema}'"

    def provide(self, cursor: duckdb.DuckDBPyConnection, query: Query, values: Mapping[str, Value]) -> None:
        """Counts the routers that a query asks about, if it reads counts, and makes the counts visible to the cursor.

        Args:
            cursor: where the query will run.
            query: the query.
            values: its parameters.
        """
        if not {*_COUNTED, *self._above} & {*query.reads}:
            return
        asked = {*tables.asked_layers(self._layers, values)}
        weights = self._has_weights and any(column in query.sql for column in _OF_WEIGHTS)
        with self._lock:
            self._count(asked - self._done[weights], weights=weights)
        cursor.execute(self._search())

    def _count(self, layers: set[Layer], *, weights: bool) -> None:
        """Counts these routers, replacing earlier counts without weights."""
        cursor = self._connection.cursor()
        cursor.execute(f"use {self._schema}")
        names = recorded_labels(cursor)
        for own in _passes(layers, labels=len(names), sums=3 if weights else 1):
            stack, first = own[0].stack, own[0].layer
            counts = _count_pass(cursor, own, names, weights=weights)
            cursor.execute("begin")
            for relation, columns in zip(_COUNTED, (counts.tokens(), counts.picks()), strict=True):
                stale = f"delete from {self._own}.{relation} where stack = $stack and layer in ({_numbers(own)})"
                cursor.execute(stale, {"stack": stack})
                cursor.register("counted", columns)
                named = f"insert into {self._own}.{relation} by name select $stack as stack, {_NAMED} from counted"
                cursor.execute(named, {"stack": stack, "first": first, "names": names})
            cursor.execute("commit")
        self._done[False] |= layers
        self._done[weights] |= layers


def counts_tokens(views: Mapping[str, str]) -> bool:
    """Whether these views count a run's tokens, rather than read counts of documents or labels from a rollup."""
    return reads_of(views["label_counts"]) == ("decisions",)


def _readers(views: Mapping[str, str]) -> list[str]:
    """Returns the views that read counts, directly or through others, in their order."""
    readers: list[str] = []
    for name, select in views.items():
        if not {*_COUNTED, *readers}.isdisjoint(reads_of(select)):
            readers.append(name)
    return readers


def _passes(layers: Iterable[Layer], *, labels: int, sums: int) -> list[list[Layer]]:
    """Divides routers, in order, into those of a pass over the rows: of one stack, and no more than memory holds."""
    passes: list[list[Layer]] = []
    for layer in sorted(layers, key=lambda layer: (layer.stack, layer.layer)):
        if passes and passes[-1][0].stack == layer.stack:
            together = [*passes[-1], layer]
            experts = max(each.n_experts for each in together)
            if _cells(together, labels) * sums * (experts + 1) <= _NUMBERS:
                passes[-1] = together
                continue
        passes.append([layer])
    return passes


def _cells(layers: Sequence[Layer], labels: int) -> int:
    """Returns the number of cells of layers in order."""
    return (layers[-1].layer - layers[0].layer + 1) * (labels + 1) * 2


def _count_pass(
    cursor: duckdb.DuckDBPyConnection, layers: Sequence[Layer], names: Sequence[str], *, weights: bool
) -> _Counts:
    """Counts routers of one stack, in order, in one pass over the rows."""
    counts = _Counts(_cells(layers, len(names)), nobody(layers), weighed=weights)
    params = {"names": names, "first": layers[0].layer}
    rows = max(BATCH, _ROWS_PER_LABEL * len(names))
    for batch in batches(cursor, layers, [_CELL], weights=weights, params=params, rows=rows):
        counts.add(batch.columns[0], batch)
    return counts


def _numbers(layers: Sequence[Layer]) -> str:
    """Returns the layers as a list of SQL constants, with which DuckDB skips row groups."""
    return ", ".join(str(layer.layer) for layer in layers)


class _Counts:
    """Counts by cell (see `_CELL`).

    Axes: T rows of a batch, C cells of it, E experts and `nobody`, S sums: picks, and with weights top-1 and
    sums of weights.
    """

    def __init__(self, cells: int, nobody: int, *, weighed: bool) -> None:
        self._nobody = nobody
        self._tokens = np.zeros(cells, np.int64)
        self._sums = np.zeros((cells, 3 if weighed else 1, nobody + 1))
        """[cells, S, E + 1]; counts are exact. Cells that do not occur take no memory, for nothing touches them."""

    def add(self, cell_t: NDArray, batch: Batch) -> None:
        """Counts rows; `cell_t` is [T]."""
        first = cell_t.min()
        cell_t = cell_t - first  # rows come router by router, so the remainders are small
        tokens = np.bincount(cell_t)
        cells = np.flatnonzero(tokens)
        size = len(cells) * (self._nobody + 1)
        starts = np.zeros(len(tokens), np.int64)
        starts[cells] = np.arange(0, size, self._nobody + 1)
        start_t = starts[cell_t]
        sums = np.zeros((self._sums.shape[1], size))
        for i, expert_t in enumerate(batch.experts_kt):
            place_t = start_t + expert_t
            sums[0] += np.bincount(place_t, minlength=size)
            if batch.weights_kt:
                sums[2] += np.bincount(place_t, batch.weights_kt[i], minlength=size)
        if batch.weights_kt:
            sums[1] = np.bincount(start_t + batch.highest(), minlength=size)
        self._tokens[first + cells] += tokens[cells]
        self._sums[first + cells] += sums.reshape(len(sums), len(cells), -1).swapaxes(0, 1)

    def tokens(self) -> dict[str, NDArray]:
        """Returns the columns of `label_tokens`, with the cell in place of layer, label and is_special."""
        cells = np.flatnonzero(self._tokens)
        return {"cell": cells, "tokens": self._tokens[cells]}

    def picks(self) -> dict[str, NDArray]:
        """Returns the columns of `label_counts`, with the cell in place of layer, label and is_special.

        Those of weights are left out if they were not counted.
        """
        cells = np.flatnonzero(self._tokens)
        row, expert = np.nonzero(self._sums[cells, 0, : self._nobody])
        picks, *weighed = (self._sums[cells[row], i, expert] for i in range(self._sums.shape[1]))
        counts: dict[str, NDArray] = {"cell": cells[row], "expert": expert, "picks": picks.astype(np.int64)}
        return counts | ({"top1": weighed[0].astype(np.int64), "weight_sum": weighed[1]} if weighed else {})
