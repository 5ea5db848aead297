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

from collector.query.groupings import reads_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import duckdb
    from numpy.typing import NDArray

    from collector.query.catalog import Query, Value
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
_PLACES = "(select unnest($names) as label, unnest(range(1, len($names) + 1))::uinteger as place)"
"""The number of each label, by a join: a search in the list would take as long as there are labels, for every row."""
_BATCH = 40_000
"""Rows of a batch, so that its arrays fit the processor's cache."""
_ROWS_PER_LABEL = 40
"""Rows of a batch for each label, so that adding up the cells of a batch costs less than counting its rows."""
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
        if not set(self._above) & set(query.reads):
            return
        stack, layer = values.get("stack"), values.get("layer")
        asked = {one for one in self._layers if stack in (None, one.stack) and layer in (None, one.layer)}
        weights = self._has_weights and any(column in query.sql for column in _OF_WEIGHTS)
        with self._lock:
            self._count(asked - self._done[weights], weights=weights)
        cursor.execute(self._search())

    def _count(self, layers: set[Layer], *, weights: bool) -> None:
        """Counts these routers, replacing earlier counts without weights."""
        cursor = self._connection.cursor()
        cursor.execute(f"use {self._schema}")
        recorded = "select label from labels union select label_set from label_sets order by 1"
        names = [name for (name,) in cursor.execute(recorded).fetchall()]
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
    counts = _Counts(_cells(layers, len(names)), experts=max(layer.n_experts for layer in layers), weighed=weights)
    top_k = max(layer.top_k for layer in layers)
    # A layer with fewer picks than others has nulls beyond them, which arrays cannot represent.
    least = min(layer.top_k for layer in layers)
    experts = [f"e{i}" if i < least else f"coalesce(e{i}::usmallint, {counts.nobody})" for i in range(top_k)]
    weighed = [f"w{i}" if i < least else f"coalesce(w{i}, '-infinity')" for i in range(top_k) if weights]
    rows = cursor.sql(
        f"select {_CELL}, {', '.join(experts + weighed)} from routing left join {_PLACES} using (label) "
        f"where stack = $stack and layer in ({_numbers(layers)})",
        params={"stack": layers[0].stack, "first": layers[0].layer, "names": names},
    )
    for batch in rows.to_arrow_reader(max(_BATCH, _ROWS_PER_LABEL * len(names))):
        cell_t, *picked = map(np.from_dlpack, batch.columns)  # to_numpy would import pandas
        counts.add(cell_t, picked[:top_k], picked[top_k:])
    return counts


def _numbers(layers: Sequence[Layer]) -> str:
    """Returns the layers as a list of SQL constants, with which DuckDB skips row groups."""
    return ", ".join(str(layer.layer) for layer in layers)


class _Counts:
    """Counts by cell (see `_CELL`).

    Axes: T rows of a batch, C cells of it, E experts plus one placeholder, S sums: picks, and with weights top-1 and
    sums of weights.
    """

    def __init__(self, cells: int, experts: int, *, weighed: bool) -> None:
        self.nobody = experts
        """Placeholder expert for missing picks."""
        self._tokens = np.zeros(cells, np.int64)
        self._sums = np.zeros((cells, 3 if weighed else 1, experts + 1))
        """[cells, S, E + 1]; counts are exact. Cells that do not occur take no memory, for nothing touches them."""

    def add(self, cell_t: NDArray, experts_kt: Sequence[NDArray], weights_kt: Sequence[NDArray]) -> None:
        """Counts rows.

        Args:
            cell_t: [T] cells.
            experts_kt: k arrays, [T] experts.
            weights_kt: k arrays, [T] weights, or none.
        """
        first = cell_t.min()
        cell_t = cell_t - first  # rows come router by router, so the remainders are small
        tokens = np.bincount(cell_t)
        cells = np.flatnonzero(tokens)
        size = len(cells) * (self.nobody + 1)
        starts = np.zeros(len(tokens), np.int64)
        starts[cells] = np.arange(0, size, self.nobody + 1)
        start_t = starts[cell_t]
        sums = np.zeros((self._sums.shape[1], size))
        for i, expert_t in enumerate(experts_kt):
            place_t = start_t + expert_t
            sums[0] += np.bincount(place_t, minlength=size)
            if weights_kt:
                sums[2] += np.bincount(place_t, weights_kt[i], minlength=size)
        if weights_kt:
            sums[1] = np.bincount(start_t + _highest(experts_kt, weights_kt), minlength=size)
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
        row, expert = np.nonzero(self._sums[cells, 0, : self.nobody])
        picks, *weighed = (self._sums[cells[row], i, expert] for i in range(self._sums.shape[1]))
        counts: dict[str, NDArray] = {"cell": cells[row], "expert": expert, "picks": picks.astype(np.int64)}
        return counts | ({"top1": weighed[0].astype(np.int64), "weight_sum": weighed[1]} if weighed else {})


def _highest(experts_kt: Sequence[NDArray], weights_kt: Sequence[NDArray]) -> NDArray:
    """Returns the expert with the highest weight of each token, of shape [T], the first among equals."""
    top_t, highest_t = experts_kt[0], weights_kt[0]
    for expert_t, weight_t in zip(experts_kt[1:], weights_kt[1:], strict=True):
        higher_t = weight_t > highest_t
        top_t, highest_t = np.where(higher_t, expert_t, top_t), np.where(higher_t, weight_t, highest_t)
    return top_t
