"""Compares two runs of the same tokens, side by side in one DuckDB.

    pair = open_runs("runs/demo", "runs/demo-random")
    pair.query("router_saturation", layer=4).df()
    pair.query("domain_specialization", layer=4).df()  # of each run, with the difference

The views of the first run have their bare names, those of the second are in the schema `other`, and the views of
`queries/comparison/views/` match each document and token of one run with the other, whatever the shards. Queries of
`queries/comparison/` read both runs; any other query runs over each, and rows with the same keys are joined.

Guarantees: only runs that agree are compared. Before a query runs, `agreement` compares vocabulary, documents, labels,
tokens and routers as far as the query reads them, and a difference is an error that names it. The DuckDB is locked
like that of a single run.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from collector.query import locked_duckdb
from collector.query.agreement import compare_routers, compare_texts, uncomparable, unmatched
from collector.query.catalog import COMPARISON, OTHER, Query, find_query, list_comparisons, list_queries, query_folder
from collector.query.groupings import LABEL, find_grouping, in_order, read_views
from collector.query.views import locate
from collector.query.warehouse import opened
from collector.store.remote_files import OtherRunFiles

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import duckdb

    from collector.query.lacking import LeftOut
    from collector.query.views import Located
    from collector.query.warehouse import Run

__all__ = ["Comparison", "list_comparisons", "list_queries", "open_runs"]

_EXPERTS = ("expert", "other_expert", "next_expert")
"""Key columns that hold an expert's number."""


class Comparison:
    """Two opened runs, and queries over both."""

    def __init__(self, run: Run, other: Run, names: tuple[str, str]) -> None:
        self.run = run
        """The first run."""
        self.other = other
        """The second run; it shares the `connection`, and its views are in the schema `other`."""
        self.names = names
        """Names of the two runs in messages."""
        self._differences: dict[tuple[str, ...] | None, list[str]] = {}

    def query(self, name: str, **params: object) -> duckdb.DuckDBPyRelation:
        """Runs a query over both runs.

        Args:
            name: of a query. One that compares two runs runs as it is. Any other runs over both: rows with the same
                keys are joined, with the second run's columns as `…_beside`, and `difference`, the second's value
                minus the first's.
            **params: values, or their text as on a command line.

        Returns:
            The rows, ordered.

        Raises:
            ValueError: the runs differ where they must agree; unknown query or parameter, a bad value, or a stack,
                layer or label that a run does not have.
        """
        query = find_query(name)
        values = self.run.bind(query, params)
        missing = self._left_out(query, params)
        self._require_agreement(query, values)
        if query.of_two_runs:
            return self.run.answer(query, values, missing)
        return self._beside(query, params, missing)

    def remarks(self, name: str, **params: object) -> list[str]:
        """Returns what of the query's answer is left out, and why; see `Run.remarks`."""
        query = find_query(name)
        missing = self._left_out(query, params)
        told = [] if missing is None else [*missing.remarks]
        if query.of_two_runs:
            told += self.run.remarks(name, **params)
        else:  # the other run has the same tokens
            told += self.run.matched(name, **params)
        return [*dict.fromkeys(told)]

    def unchecked(self) -> tuple[str, ...]:
        """Describes what cannot be compared of the two runs' texts, and why; empty if everything can be."""
        return (*uncomparable(self.run, self.other, self.names), *unmatched(self.run, self.other, self.names))

    def _left_out(self, query: Query, params: Mapping[str, object]) -> LeftOut | None:
        """Returns what one of the runs cannot give, or both."""
        ours, theirs = (run.left_out(query, run.bind(query, params)) for run in (self.run, self.other))
        return theirs if ours is None else ours.joined(theirs)

    def _text_differences(self, labels: Sequence[str] | None) -> list[str]:
        key = None if labels is None else tuple(labels)
        if key not in self._differences:
            self._differences[key] = compare_texts(self.run, self.other, self.names, labels)
        return self._differences[key]

    def _require_agreement(self, query: Query, values: Mapping[str, Any]) -> None:
        """Raises if the runs differ in anything that the query reads."""
        grouping = find_grouping(self.run.by)
        # If labels are groups of tokens, choosing labels excludes no document.
        labels = None if grouping is not None and grouping.of == "token" else values.get("labels")
        differences = [*self._text_differences(labels)]
        if "stack" in values:
            # Expert numbers are comparable only between routers of the same size.
            geometry = query.of_two_runs or bool(query.keys(_EXPERTS))
            differences += compare_routers(
                self.run, self.other, self.names, stack=values["stack"], layer=values["layer"], geometry=geometry
            )
        if differences:
            raise ValueError(f"{' and '.join(self.names)} cannot be compared: {'; '.join(differences)}")

    def _beside(
        self, query: Query, params: Mapping[str, object], missing: LeftOut | None
    ) -> duckdb.DuckDBPyRelation:  # fmt: skip
        cursor = self.run.cursor()
        rows = [run.answer(query, run.bind(query, params), missing) for run in (self.run, self.other)]
        columns = rows[0].columns
        for name, relation in zip(("ours", "theirs"), rows, strict=True):
            cursor.register(name, relation.to_arrow_table())
        keys = query.keys(columns)
        same = " and ".join(f"ours.{key} is not distinct from theirs.{key}" for key in keys)
        selected = [f"coalesce(ours.{key}, theirs.{key}) as {key}" for key in keys]
        for column in (column for column in columns if column not in keys):
            selected += [f"ours.{column}", f"theirs.{column} as {column}_beside"]
            if column == "value":
                selected.append("theirs.value - ours.value as difference")
        places = ", ".join(str(place) for place in range(1, len(keys) + 1))
        return cursor.sql(f"select {', '.join(selected)} from ours full join theirs on {same} order by {places}")


def open_runs(
    root: str | os.PathLike[str],
    other: str | os.PathLike[str],
    *,
    by: str = LABEL,
    match: str | Sequence[str] | None = None,
    rollup: bool = True,
) -> Comparison:
    """Opens two runs side by side, each local or on an object store.

    Args:
        root: the first run's directory: a path, or the URL that it was collected to.
        other: the second run's directory.
        by: what `label` means in all views and queries, see `open_run`.
        match: what labels are matched on in each run, see `open_run`.
        rollup: whether to read counts from the runs' rollups, see `open_run`.

    Raises:
        FileNotFoundError: there is no run.
        StoreError: an object store refuses or does not answer.
        ValueError: for the same reasons as `open_run`.
    """
    first = locate(root, by=by, match=match, rollup=rollup)
    second = locate(other, by=by, match=match, rollup=rollup, schema=OTHER, files_of=OtherRunFiles)
    connection = locked_duckdb.connect(first.paths | second.paths, (*first.mounts, *second.mounts))
    connection.execute(f"create schema {OTHER};\n{first.script}\n{second.script}\n{_aligning_views(first, second)}")
    return Comparison(opened(first, connection), opened(second, connection), (os.fspath(root), os.fspath(other)))


def _aligning_views(*runs: Located) -> str:
    folder = query_folder() / COMPARISON / "views"
    views = read_views(folder)
    if any("imported" in run.info for run in runs):  # tokens may be missing between others
        views |= read_views(folder / "with_gaps")
    views = in_order(views)
    return "\n".join(f"create view {name} as\n{select};" for name, select in views.items())
