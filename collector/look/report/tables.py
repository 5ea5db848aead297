"""What figures are drawn from: rows of queries, as columns, with the commands that give the same rows.

Guarantees: every number is a query's; here rows are only chosen, put side by side and rounded. Columns whose name
begins with an underscore are places in a drawing and not data.
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
"""Columns of an interval, where there is one."""
LEVEL = 95
"""Of intervals, in percent."""
_DIGITS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """One of the runs that a report shows."""

    name: str
    """How figures call it."""
    root: str
    """Where it is, as the command line named it."""
    run: Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of one query, of one run or of several under each other."""

    query: str
    params: Mapping[str, object]
    sides: Sequence[Side]
    columns: Mapping[str, np.ndarray]
    """Name -> one cell per row; stack, layer and run first. Masked where a cell is null."""
    by_layer: bool
    """Whether a drawing shows one layer at a time."""
    resamples: int = 0
    """Bootstrap samples behind the intervals of the first run; 0: there are none."""
    also: Sequence[str] = ()
    """Further command lines that give columns of this table, of all layers at once."""

    def __len__(self) -> int:
        """Rows."""
        return len(self.columns["layer"])

    def __getitem__(self, name: str) -> np.ndarray:
        """A column."""
        return self.columns[name]

    def having(self, **columns: Iterable[Any]) -> Table:
        """The table with more columns, or with others."""
        added = {name: np.ma.asarray(list(cells)) for name, cells in columns.items()}
        return self.replacing({**self.columns, **added})

    def replacing(self, columns: Mapping[str, np.ndarray]) -> Table:
        """The same source with other columns."""
        return dataclasses.replace(self, columns=columns)

    def only(self, keep: np.ndarray) -> Table:
        """The rows for which `keep` is true."""
        return self.replacing({name: column[keep] for name, column in self.columns.items()})

    def of(self, router: Router) -> Table:
        """The rows of one router."""
        return self.only((self["stack"] == router[0]) & (self["layer"] == router[1]))

    def routers(self) -> list[Router]:
        """The routers of all rows, row by row."""
        return list(zip(self["stack"].tolist(), self["layer"].tolist(), strict=True))

    def commands(self) -> list[str]:
        """The command lines that write these rows, without the choice of a layer; one per run."""
        given = [f"--{name.replace('_', '-')} {_as_text(value)}" for name, value in self.params.items()]
        drawn = [f"--interval {LEVEL} --resamples {self.resamples}"] if self.resamples else []
        return [
            " ".join(["collector query", shlex.quote(side.root), self.query, *given, *(drawn if i == 0 else [])])
            for i, side in enumerate(self.sides)
        ]

    def cells(self) -> dict[str, list[Any]]:
        """Columns for JSON, numbers rounded to 4 significant digits."""
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
    """Asks every run the same question.

    Args:
        sides: the runs.
        query: of `queries/`.
        columns: to keep, besides stack, layer, run, and the interval.
        where: which rows to keep, in SQL.
        by_layer: see `Table`.
        resamples: bootstrap samples for intervals, which the first run gets; 0 for none.
        **params: of the query.
    """
    parts = []
    for i, side in enumerate(sides):
        answer = (
            _with_intervals(side, query, resamples, params) if i == 0 and resamples else side.run.query(query, **params)
        )
        kept = ["stack", "layer", *columns, *(name for name in INTERVAL if name in answer.columns)]
        found = answer.filter(where).project(", ".join(f'"{name}"' for name in kept)).fetchnumpy()
        parts.append({"run": np.full(len(found["layer"]), side.name, object), **found})
    stacked = {
        name: np.ma.concatenate([part.get(name, np.ma.masked_all(len(part["run"]))) for part in parts])
        for name in parts[0]
    }
    return Table(
        query=query, params=params, sides=sides, columns=stacked, by_layer=by_layer, resamples=resamples
    )  # fmt: skip


def _with_intervals(side: Side, query: str, resamples: int, params: Mapping[str, Any]) -> duckdb.DuckDBPyRelation:
    rows = inference.intervals(side.run, query, level=LEVEL, resamples=resamples, **params)
    return side.run.connection.cursor().from_arrow(rows)


def in_labels(labels: Sequence[str], column: str = "label") -> str:
    """SQL condition that keeps the rows of these labels."""
    return f"{column} in ({', '.join(literal(label) for label in labels)})"


def places(table: Table, column: str, orders: Mapping[Router, Sequence[Any]]) -> list[int]:
    """Row by row, the place of a cell in the order that holds at the row's router."""
    found = {router: {item: place for place, item in enumerate(order)} for router, order in orders.items()}
    cells = zip(table.routers(), table[column].tolist(), strict=True)
    return [found[router].get(cell, len(found[router])) for router, cell in cells]


def matrix(rows: Table, row: str, column: str, *, value: str = "value") -> tuple[list[Any], list[Any], np.ndarray]:
    """Rows of one router and run as a matrix: names of its rows, of its columns, and the values; 0 where none is."""
    row_names, row_places = np.unique(rows[row].tolist(), return_inverse=True)
    column_names, column_places = np.unique(rows[column].tolist(), return_inverse=True)
    values = np.zeros((len(row_names), len(column_names)))
    values[row_places, column_places] = np.ma.filled(rows[value].astype(float), 0)
    return row_names.tolist(), column_names.tolist(), values


def span(numbers: np.ndarray, words: Callable[[float], str] = "{:,}".format) -> str:
    """The least and the largest of some numbers, in words."""
    low, high = numbers.min().item(), numbers.max().item()
    return words(low) if low == high else f"{words(low)} – {words(high)}"


def extent(table: Table, metric: str, *columns: str, zero: bool = True) -> tuple[float, float]:
    """The least and the largest value of a metric and its baseline, and of other columns that the table has.

    Args:
        table: with a column `metric`.
        metric: its name there.
        *columns: further ones that are drawn on the same axis.
        zero: begin at zero.
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
