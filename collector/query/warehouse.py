"""Opens a run in DuckDB: its tables as views, and the queries of `queries/` over them.

`views` decides which files the views read and what `label` means in them. Counts by label are computed when a query
first needs them (`label_counts`), unless the run has a rollup; what SQL cannot compute for each query that reads it
(`relations`). A run on an object store is read by ranges, in place.

Guarantees: a query runs with all its parameters bound; a label or router that the run does not have is an error, never
an empty table; `Run.sql` runs read-only statements only, in a locked DuckDB (see `locked_duckdb`). Nothing here writes:
results are returned as DuckDB relations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import duckdb

from collector.models.edits import parse_arm
from collector.query import locked_duckdb, relations
from collector.query.catalog import Query, Value, find_query, list_queries, remarks_of
from collector.query.counting import macros as computed
from collector.query.groupings import LABEL
from collector.query.label_counts import LabelCounts, counts_tokens
from collector.query.lacking import left_out
from collector.query.locked_duckdb import one_line_errors
from collector.query.matching import Matching
from collector.query.views import committed_files, literal, locate, locate_shard, views_sql
from collector.store import tables

if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    import pyarrow as pa

    from collector.query.lacking import LeftOut
    from collector.query.views import Located

__all__ = ["Query", "Run", "committed_files", "list_queries", "one_line_errors", "open_run", "views_sql"]

FEW_DOCUMENTS, FEW_PICKS = 20, 20
"""A label with fewer documents, or fewer picks per expert on average, tells little."""
_FEW = """
select label
from labels
where
    ($labels is null or list_contains($labels, label))
    and (documents < $documents or tokens * (select min(top_k / n_experts) from layers) < $picks)
order by tokens, label
"""
_TOLD = 6
"""Labels that a remark names."""
_READS_ONLY = "only a single statement that reads (SELECT …) can run here"


class Run:
    """An opened run: views over its committed files in an in-memory DuckDB."""

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        info: dict[str, Any],
        *,
        complete: bool,
        by: str = LABEL,
        schema: str = "main",
        several_labels: bool = False,
        label_counts: LabelCounts | None = None,
        absent: Mapping[str, str] | None = None,
        strata: Run | None = None,
        match: str = "",
        has_rollup: bool = False,
        replaced: Collection[str] = (),
    ) -> None:
        self.connection = connection
        """In-memory DuckDB that holds the views."""
        self.info = info
        """Content of run.json."""
        self.complete = complete
        """Whether every shard was committed when the run was opened."""
        self.by = by
        """What `label` means: the recorded label, or the name of a grouping."""
        self.schema = schema
        """Schema of the views."""
        self.several_labels = several_labels
        """Whether documents have several labels."""
        self._label_counts = label_counts
        """Counts on demand; None if the views read a rollup."""
        self._absent = absent or {}
        """What views need that this run cannot have, by name."""
        self.matching = None if strata is None else Matching(match, self, strata)
        """Weighs labels alike in the strata that they share, if they are matched."""
        self.has_rollup: bool = has_rollup if strata is None else strata.has_rollup
        """Whether the views read counts of documents from a rollup."""
        self._replaced = replaced
        """Derived views, which replace base relations of the same name."""

    def query(self, name: str, **params: object) -> duckdb.DuckDBPyRelation:
        """Runs a query of `queries/`.

        Args:
            name: of the query, see `list_queries`.
            **params: values, or their text as on a command line.

        Returns:
            The rows, ordered; computed when they are fetched (`.df()`, `.fetchall()`,
            `.to_arrow_table()`).

        Raises:
            ValueError: unknown query or parameter, a bad value, a stack, layer or label that the
                run does not have, or a query that compares two runs.
        """
        query = find_query(name)
        if query.of_two_runs:
            raise ValueError(f"{name} compares two runs: name the other one with --beside, in Python with open_runs")
        values = self.bind(query, params)
        return self.answer(query, values, self.left_out(query, values))

    def answer(
        self, query: Query, values: Mapping[str, Value], missing: LeftOut | None = None
    ) -> duckdb.DuckDBPyRelation:  # fmt: skip
        """Runs a query with bound values, and leaves out what the run cannot give; see `query`."""
        cursor = self.cursor()
        if self._label_counts is not None:
            self._label_counts.provide(cursor, query, values)
        layers = tables.recorded_layers(self.info)
        computed.provide(cursor, query, values, layers, has_weights="weights" not in self.lacks)
        relations.provide(cursor, query, layers, values)
        if self.matching is not None:
            self.matching.provide(cursor, query, values)
        answer = cursor.sql(query.sql, params=values)
        return answer if missing is None else missing.taken_from(answer)

    def left_out(self, query: Query, values: Mapping[str, Value]) -> LeftOut | None:
        """Returns what of the query's answer this run, an imported one, cannot give; None if it gives all.

        Raises:
            ValueError: it can give nothing.
        """
        return left_out(query, values, self.lacks, self.info.get("imported", {}).get("from", ""))

    def remarks(self, name: str, **params: object) -> list[str]:
        """Returns why the query's answer with these parameters has no row or value, or which of several it shows.

        Args:
            name: of the query.
            **params: as for `query`.
        """
        select, query = remarks_of(name), find_query(name)
        values = self.bind(query, params)
        missing = self.left_out(query, values)
        told = [] if missing is None else [*missing.remarks]
        told += self.matched(name, **params)
        if select is None:
            return told
        used = duckdb.extract_statements(select)[0].named_parameters
        rows = self.cursor().sql(select, params={key: values[key] for key in used}).fetchall()
        return [*told, *(remark for (remark,) in rows)]

    def matched(self, name: str, **params: object) -> list[str]:
        """Returns how much of each label's text was matched for a query with these parameters; none if labels are not.

        Args:
            name: of a label-level query.
            **params: as for `query`.
        """
        query = find_query(name)
        return [] if self.matching is None else self.matching.remarks(query, self.bind(query, params))

    def warnings(self, name: str, **params: object) -> list[str]:
        """Returns which labels have so little text that a label-level query tells little about them.

        Args:
            name: of the query.
            **params: as for `query`.
        """
        query = find_query(name)
        if not query.is_label_level:
            return []
        labels = self.bind(query, params)["labels"]
        params = {"labels": labels, "documents": FEW_DOCUMENTS, "picks": FEW_PICKS}
        few = [label for (label,) in self.cursor().sql(_FEW, params=params).fetchall()]
        if not few:
            return []
        named = ", ".join(few[:_TOLD]) + (f" and {len(few) - _TOLD} more" if len(few) > _TOLD else "")
        return [
            f"{named}: fewer than {FEW_DOCUMENTS} documents, or {FEW_PICKS} picks per expert: what differs may be "
            "chance, which --interval 95 tells"
        ]

    def bind(self, query: Query, params: Mapping[str, object]) -> dict[str, Value]:
        """Returns values for all parameters of a query, checked against this run.

        Raises:
            ValueError: unknown parameter, a bad value, or a stack, layer or label that the run does not have; or the
                query reads what the run did not record.
        """
        self.require(query)
        if self.matching is not None:
            self.matching.check(query)
        values = query.bind(params)
        self.check(stack=values.get("stack"), layer=values.get("layer"), labels=values.get("labels"))
        if values.get("arm") is not None:
            self._check_arm(values["arm"])
        if isinstance(labels := values.get("labels"), list):
            values["labels"] = self.with_sets(labels)
        return values

    def require(self, query: Query) -> None:
        """Checks that the run has what a query reads.

        Raises:
            ValueError: it does not; the message says what would give it.
        """
        for view in query.reads:
            if view in self._absent:
                raise ValueError(f"{query.name} reads {view}, {self._absent[view]}")

    def with_sets(self, labels: list[str]) -> list[str]:
        """Adds the sets of labels that have one of these in them, by which documents with several are recorded."""
        if not self.several_labels:
            return labels
        sets = "select distinct label_set from label_sets where list_contains($labels, label) order by label_set"
        return [*labels, *(name for (name,) in self.cursor().sql(sets, params={"labels": labels}).fetchall())]

    @property
    def lacks(self) -> frozenset[str]:
        """What the source of an imported run did not have; empty for any other run."""
        return frozenset(tables.lacking(self.info))

    def base(self, relation: str) -> str:
        """Returns the name of a base relation as it was recorded, without the labels of a grouping."""
        return f"recorded_{relation}" if relation in self._replaced else relation

    def has(self, relation: str) -> bool:
        """Whether this run has what a relation reads, which depends on what was recorded."""
        return relation not in self._absent

    def cursor(self) -> duckdb.DuckDBPyConnection:
        """Returns a connection to the same DuckDB, in which bare names refer to the views of this run."""
        cursor = self.connection.cursor()
        if self.schema != "main":
            cursor.execute(f"use {self.schema}")
        return cursor

    def sql(self, statement: str, tables: Mapping[str, pa.Table] | None = None) -> duckdb.DuckDBPyRelation:
        """Runs one read-only statement over the views.

        Args:
            statement: SQL.
            tables: further relations that it may read, by name.

        Raises:
            ValueError: it is not a single SELECT (or FROM, WITH, VALUES, DESCRIBE, SUMMARIZE …), it
                writes, or it has an error.
        """
        cursor = self.cursor()
        for name, table in (tables or {}).items():
            cursor.register(name, table)
        try:
            kinds = [parsed.type.name for parsed in duckdb.extract_statements(statement)]
            if kinds != ["SELECT"]:
                raise ValueError(f"{_READS_ONLY}; got {', '.join(kinds) or 'nothing'}")
            # A SELECT may still write through a CTE, but only at the top level; inside query() it cannot.
            cursor.execute(f"explain select * from query({literal(statement)})").fetchall()
        except duckdb.Error as error:
            reason = str(error).split("\n\nLINE ")[0]
            hint = f"{_READS_ONLY}, without a CTE that writes: " if "must be at the top level" in reason else ""
            raise ValueError(hint + reason) from error
        return cursor.sql(statement)

    def check(self, *, stack: Value = None, layer: Value = None, labels: Value = None) -> None:
        """Checks that the run has this stack, layer and these labels.

        Raises:
            ValueError: the run does not have one of them; the message lists those that it has.
        """
        self._check_router(stack, layer)
        self._check_labels(labels)

    def _check_router(self, stack: Value, layer: Value) -> None:
        stacks = list(dict.fromkeys(router["stack"] for router in self.info["layers"]))
        if stack is not None and stack not in stacks:
            raise ValueError(f"stack {stack!r} is not recorded in this run; it has {', '.join(stacks)}")
        layers = [router["layer"] for router in self.info["layers"] if stack in (None, router["stack"])]
        if layer is not None and layer not in layers:
            where = "in this run" if stack is None else f"for the {stack} in this run"
            known = ", ".join(map(str, sorted(set(layers))))
            raise ValueError(f"layer {layer} is not recorded {where}; it has {known}")

    def _check_arm(self, arm: Value) -> None:
        names = list(dict.fromkeys(parse_arm(text).name for text in self.info["config"]["arms"]))
        if arm not in names:
            raise ValueError(f"this run has no arm {arm!r}; it has {', '.join(names)}")

    def _check_labels(self, labels: Value) -> None:
        if not isinstance(labels, list):
            return
        known = [row[0] for row in self.cursor().sql("select label from labels order by label").fetchall()]
        if unknown := [label for label in labels if label not in known]:
            raise ValueError(
                f"no document of this run has the {self.by} {unknown[0]!r}; it has {', '.join(known) or 'none'}"
            )


def open_run(
    root: str | os.PathLike[str],
    *,
    by: str = LABEL,
    match: str | Sequence[str] | None = None,
    rollup: bool = True,
    memory_limit: str | None = None,
) -> Run:
    """Opens a run, complete or not, local or on an object store.

    Args:
        root: the run directory: a path, or the URL that it was collected to.
        by: what `label` means in all views and queries: the recorded label, or a grouping of
            `queries/groupings/`: source, script, length, position, token_class, span, role or phase.
        match: groupings, for example `position,token_class`: queries then compare labels within the strata that they
            share, weighted alike, and only label-level queries are answered (see `matching`).
        rollup: whether to read counts from the run's rollup if there is a current one.
        memory_limit: maximum memory of DuckDB, for example 4GB (default: 80 % of the machine's memory); what does not
            fit spills to the folder for temporary files.

    Raises:
        FileNotFoundError: there is no run.
        StoreError: the object store refuses or does not answer.
        ValueError: a commit record is damaged, the run is in the layout of an earlier version, or the grouping does
            not exist or needs data that this run does not have.
    """
    located = locate(root, by=by, match=match, rollup=rollup)
    connection = locked_duckdb.connect(located.paths, located.mounts, memory_limit)
    connection.execute(located.script)
    return opened(located, connection)


def opened(located: Located, connection: duckdb.DuckDBPyConnection) -> Run:
    """Returns a located run as a `Run`, in a DuckDB in which its script has been executed."""
    counts = None
    if counts_tokens(located.views):
        counts = LabelCounts(
            connection, tables.recorded_layers(located.info), located.views, located.schema,
            has_weights="weights" not in tables.lacking(located.info),
        )  # fmt: skip
    return Run(
        connection, located.info, complete=located.complete, by=located.by, schema=located.schema,
        several_labels=located.several_labels, label_counts=counts, absent=located.absent, match=located.match,
        has_rollup=not counts_tokens(located.views), replaced=located.views,
        strata=None if located.strata is None else opened(located.strata, connection),
    )  # fmt: skip


def open_shard(paths: Mapping[str, Path], info: dict[str, Any]) -> Run:
    """Opens the files of one shard as a run of their own.

    Args:
        paths: local files by table.
        info: content of run.json.
    """
    located = locate_shard(paths, info)
    connection = locked_duckdb.connect(located.paths)
    connection.execute(located.script)
    return Run(connection, info, complete=False, several_labels=located.several_labels, absent=located.absent)
