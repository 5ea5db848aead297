"""Fetches the data of figures: rows of queries, as columns, with the commands that reproduce them.

Guarantees: every number comes from a query; here rows are only filtered, combined and rounded. Columns whose names
start with an underscore are positions in a drawing, not data.
"""

from __future__ import annotations

import dataclasses
import shlex
from typing import TYPE_CHECKING, Any

import numpy as np

from collector.query import inference
from collector.query.views import literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import duckdb

    from collector.query.warehouse import Run

Router = tuple[str, int]
"""Stack and layer."""
INTERVAL = ("low", "high")
"""Columns of an interval, if there is one."""
LEVEL = 95
"""Level of intervals, in percent."""
_DIGITS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """One of the runs that a report shows."""

    name: str
    """Name in figures."""
    root: str
    """Run directory, as given on the command line."""
    run: Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of one query, from one run or stacked from several."""

    query: str
    params: Mapping[str, object]
    sides: Sequence[Side]
    columns: Mapping[str, np.ndarray]
    """Columns by name, one cell per row, masked where null; stack, layer and run come first."""
    by_layer: bool
    """Whether a drawing shows one layer at a time."""
    resamples: int = 0
    """Bootstrap samples for the intervals of the first run; 0 if there are no intervals."""
    also: Sequence[str] = ()
    """Further command lines that reproduce columns of this table, for all layers at once."""

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.columns["layer"])

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns a column."""
        return self.columns[name]

    def having(self, **columns: Iterable[Any]) -> Table:
        """Returns the table with columns added or replaced."""
        added = {name: np.ma.asarray(list(cells)) for name, cells in columns.items()}
        return self.replacing({**self.columns, **added})

    def replacing(self, columns: Mapping[str, np.ndarray]) -> Table:
        """Returns a table of the same source with other columns."""
        return dataclasses.replace(self, columns=columns)

    def only(self, keep: np.ndarray) -> Table:
        """Returns the rows for which `keep` is true."""
        return self.replacing({name: column[keep] for name, column in self.columns.items()})

    def of(self, router: Router) -> Table:
        """Returns the rows of one router."""
        return self.only((self["stack"] == router[0]) & (self["layer"] == router[1]))

    def routers(self) -> list[Router]:
        """Returns the router of each row."""
        return list(zip(self["stack"].tolist(), self["layer"].tolist(), strict=True))

    def commands(self) -> list[str]:
        """Returns the command lines that write these rows, one per run, without the choice of a layer."""
        given = [f"--{name.replace('_', '-')} {_as_text(value)}" for name, value in self.params.items()]
        drawn = [f"--interval {LEVEL} --resamples {self.resamples}"] if self.resamples else []
        return [
            " ".join(["collector query", shlex.quote(side.root), self.query, *given, *(drawn if i == 0 else [])])
            for i, side in enumerate(self.sides)
        ]

    def cells(self) -> dict[str, list[Any]]:
        """Returns columns for JSON, with floats rounded to 4 significant digits."""
        return {name: _cells(column) for name, column in self.columns.items()}


def fetch(
    sides: Sequence[Side],
    query: str,
    columns: Sequence[str],
    *,
    where: str = "true",
    by_layer: bool = False,
    resamples: int = 0,
    **params: object,
) -> Table:
    """Runs the same query over every run.

    Args:
        sides: the runs.
        query: of `queries/`.
        columns: columns to keep, besides stack, layer, run, and the interval.
        where: SQL condition of the rows to keep.
        by_layer: see `Table`.
        resamples: bootstrap samples for intervals of the first run; 0 for none.
        **params: of the query.
    """
    parts = []
    for i, side in enumerate(sides):
        answer = (
            _with_intervals(side, query, resamples, params) if i == 0 and resamples else side.run.query(query, **params)
        )
        found = read_columns(answer, columns, where)
        parts.append({"run": np.full(len(found["layer"]), side.name, object), **found})
    stacked = {
        name: np.ma.concatenate([part.get(name, np.ma.masked_all(len(part["run"]))) for part in parts])
        for name in parts[0]
    }
    return Table(
        query=query, params=params, sides=sides, columns=stacked, by_layer=by_layer, resamples=resamples
    )  # fmt: skip


def read_columns(answer: duckdb.DuckDBPyRelation, columns: Sequence[str], where: str = "true") -> dict[str, np.ndarray]:
    """Returns columns of an answer, with stack, layer and the interval, as far as it has them.

    Args:
        answer: of a query.
        columns: to keep.
        where: SQL condition of the rows to keep.
    """
    kept = [
        *(["stack"] if "stack" in answer.columns else []),
        *(["layer"] if "layer" in answer.columns else []),
        *columns,
        *(name for name in INTERVAL if name in answer.columns),
    ]
    found = answer.filter(where).project(", ".join(f'"{name}"' for name in kept)).fetchnumpy()
    count = len(found[columns[0]])
    found.setdefault("layer", np.ma.masked_all(count))  # of a model as a whole
    found.setdefault("stack", np.full(count, "decoder", object))
    return found


def _with_intervals(side: Side, query: str, resamples: int, params: Mapping[str, Any]) -> duckdb.DuckDBPyRelation:
    rows = inference.intervals(side.run, query, level=LEVEL, resamples=resamples, **params)
    return side.run.connection.cursor().from_arrow(rows)


def in_labels(labels: Sequence[str], column: str = "label") -> str:
    """Returns an SQL condition that keeps the rows of these labels."""
    return f"{column} in ({', '.join(literal(label) for label in labels)})"


def places(table: Table, column: str, orders: Mapping[Router, Sequence[Any]]) -> list[int]:
    """Returns for each row the position of its cell in the order of its router."""
    found = {router: {item: place for place, item in enumerate(order)} for router, order in orders.items()}
    cells = zip(table.routers(), table[column].tolist(), strict=True)
    return [found[router].get(cell, len(found[router])) for router, cell in cells]


def matrix(rows: Table, row: str, column: str, *, value: str = "value") -> tuple[list[Any], list[Any], np.ndarray]:
    """Pivots the rows of one router and run: returns row names, column names, and a matrix with 0 for missing cells."""
    row_names, row_places = np.unique(rows[row].tolist(), return_inverse=True)
    column_names, column_places = np.unique(rows[column].tolist(), return_inverse=True)
    values = np.zeros((len(row_names), len(column_names)))
    values[row_places, column_places] = np.ma.filled(rows[value].astype(float), 0)
    return row_names.tolist(), column_names.tolist(), values


def span(numbers: np.ndarray, words: Callable[[float], str] = "{:,}".format) -> str:
    """Formats the range of some numbers."""
    low, high = numbers.min().item(), numbers.max().item()
    return words(low) if low == high else f"{words(low)} – {words(high)}"


def extent(table: Table, metric: str, *columns: str, zero: bool = True) -> tuple[float, float]:
    """Returns the minimum and maximum over a metric, its baseline, and other columns if the table has them.

    Args:
        table: with a column `metric`.
        metric: name of the metric.
        *columns: further columns that are drawn on the same axis.
        zero: whether the range starts at zero.
    """
    rows = table.only(table["metric"] == metric)
    drawn = [rows[name] for name in ("value", "baseline", *columns) if name in rows.columns]
    low, high = (float(end) for end in (min(c.min() for c in drawn), max(c.max() for c in drawn)))
    low = 0.0 if zero else low
    return low, high if high > low else low + 1


def _cells(column: np.ndarray) -> list[Any]:
    if column.dtype.kind != "f":
        return list(column.tolist())
    filled = np.ma.filled(column.astype(float), np.nan)
    return [None if cell != cell else float(f"{cell:.{_DIGITS}g}") for cell in filled.tolist()]


def _as_text(value: object) -> str:
    if isinstance(value, list | tuple):
        return shlex.quote(",".join(map(str, value)))
    return shlex.quote(str(value).lower() if isinstance(value, bool) else str(value))
