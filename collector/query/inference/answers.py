"""Runs a query of `queries/` over many samples of documents at once.

Each metric has a single definition, its SQL file. The samples replace the views that are sums by label, where each
sample is a separate `stack`. Every query keeps stacks apart, so one statement answers for all samples.

Queries that read more than sums over documents are rejected, because weighted counts cannot answer them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from collector.data.sources import LABEL_SEPARATOR
from collector.query import locked_duckdb
from collector.query.catalog import LABEL_SUMS, find_query, label_level_names, macros
from collector.query.document_counts import LOSSES, OUTPUTS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from collector.query.catalog import Query, Value
    from collector.query.document_counts import DocumentCounts
    from collector.query.inference.resampling import Sums
    from collector.query.warehouse import Run

KEYS = ("metric", "layer", "label", "label_a", "label_b", "expert")
"""Columns that identify the rows of a router's answer; each query has some of them."""
_GIVEN = {"labels"}
"""Views that are the same for all samples."""
_EVERY_ROW: dict[str, dict[str, Value]] = {"top_experts": {"n": 2**31 - 1}}
"""Parameters with which a sample has every row of the run's answer: an expert may rank lower in a sample."""


def ask(run: Run, name: str, params: Mapping[str, object], column: str = "value") -> tuple[pa.Table, SampledQuery]:
    """Returns the answer of a run, and the same query prepared for samples of its documents.

    Args:
        run: the run.
        name: of the query.
        params: as for `Run.query`.
        column: column of the query whose values the samples return.

    Raises:
        ValueError: the query does not follow from sums over documents (the message says why, and lists the queries that
            do) or has no such column; and for the same reasons as `Run.query`.
    """
    query = find_query(name)
    if not query.is_label_level:
        raise ValueError(
            f"{name} reads {', '.join(query.reads)}, and samples of documents are known by the sums in "
            f"{', '.join(sorted(LABEL_SUMS))} alone; queries that follow from these are {label_level_names()}"
        )
    answer = run.query(name, **params).to_arrow_table()
    numbers = [field.name for field in answer.schema if field.name not in KEYS and _is_number(field.type)]
    if column not in numbers:
        raise ValueError(f"{name} has no numbers {column!r}; it has {', '.join(numbers)}")
    keys = answer.select(["stack", *_keys(answer)])
    assert keys.group_by(keys.column_names).aggregate([]).num_rows == answer.num_rows, "KEYS lacks a key of this query"
    given = {view: run.connection.cursor().sql(f"from {view}").to_arrow_table() for view in _GIVEN & {*query.reads}}
    return answer, SampledQuery(query, params, column, given)


def _keys(rows: pa.Table) -> list[str]:
    return [key for key in KEYS if key in rows.column_names]


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


class SampledQuery:
    """A query with its parameters, to run over the samples of one router after another."""

    def __init__(
        self,
        query: Query,
        params: Mapping[str, object],
        column: str = "value",
        given: Mapping[str, pa.Table] | None = None,
    ) -> None:
        """Opens a separate DuckDB and registers `given`, the views that are the same for all samples."""
        self.query = query
        self._column = column
        self._params = query.bind(params) | _EVERY_ROW.get(query.name, {})
        self._params |= {"stack": None} if "stack" in self._params else {}  # it is the sample's number
        self._connection = locked_duckdb.connect(())
        self._connection.execute(macros())
        self._register(given or {})

    def values(self, rows: pa.Table, counts: DocumentCounts, sums: Sums) -> NDArray[np.float64]:
        """Returns the column for R rows in S samples, of shape [R, S]; NaN where it is null.

        Args:
            rows: the answer for this router; only its keys are used.
            counts: of the router.
            sums: of S samples of its documents.
        """
        keys = _keys(rows)
        wanted = rows.select(keys).append_column("row", pa.array(np.arange(rows.num_rows)))
        self._register({"wanted": wanted, **_tables(counts, sums)})
        same = " and ".join(f"wanted.{key} is not distinct from answer.{key}" for key in keys)
        found = self._connection.execute(
            f'select wanted.row, answer.stack as sample, answer."{self._column}"::double as value '
            f"from (\n{self.query.sql}\n) as answer inner join wanted on {same}",
            self._params,
        ).fetchnumpy()
        # A sample can lack a row only in `top_experts`, for an expert that it never chooses: the share is 0.
        values = np.zeros((rows.num_rows, len(sums.tokens_SL)))
        values[found["row"], found["sample"]] = np.ma.filled(found["value"], np.nan)
        return values

    def answer(self, counts: DocumentCounts, sums: Sums) -> pa.Table:
        """Returns all rows of all samples, with the number of the sample as `stack`."""
        self._register(_tables(counts, sums))
        return self._connection.sql(self.query.sql, params=self._params).to_arrow_table()

    def _register(self, tables: Mapping[str, pa.Table]) -> None:
        for name, table in tables.items():
            self._connection.register(name, table)


def _tables(counts: DocumentCounts, sums: Sums) -> dict[str, pa.Table]:
    """Returns those of `LABEL_SUMS` that are known, layers and experts, with the number of the sample as `stack`."""
    samples, labels, experts = sums.picks_SLE.shape
    sample_S, expert_E = np.arange(samples, dtype=np.int32), np.arange(experts, dtype=np.int32)
    assignments = _keys_of_labels(sums, experts) | {
        "expert": np.tile(expert_E, samples * labels),
        "tokens": np.repeat(np.rint(sums.tokens_SL).astype(np.int64), experts),
        "picks": sums.picks_SLE.ravel(),
        "top1": sums.top1_SLE.ravel(),
        "weight_sum": sums.weight_sum_SLE.ravel(),
    }
    statistics_M = sums.statistics_SLM.reshape(-1, len(counts.statistics)).T
    statistics = _keys_of_labels(sums, 1) | {"tokens": sums.tokens_SL.ravel()}
    statistics |= dict(zip(counts.statistics, statistics_M, strict=True))
    columns = {
        "assignments": assignments,
        "label_losses" if counts.statistics == LOSSES else "label_statistics": statistics,
        "layers": {"stack": sample_S},
        "experts": {"stack": np.repeat(sample_S, experts), "expert": np.tile(expert_E, samples)},
    }
    if sums.outputs_OSLE:
        put_out = {name: each.ravel() for name, each in zip(OUTPUTS, sums.outputs_OSLE, strict=True)}
        columns["label_outputs"] = assignments | put_out
    geometry = {"layer": counts.layer, "n_experts": counts.n_experts, "top_k": counts.top_k}
    sets = [(name, label) for name in sums.labels if LABEL_SEPARATOR in name for label in name.split(LABEL_SEPARATOR)]
    text = pa.schema([("label_set", pa.string()), ("label", pa.string())])
    label_sets = pa.Table.from_pylist([dict(zip(text.names, pair, strict=True)) for pair in sets], schema=text)
    return {name: _with_constants(each, geometry) for name, each in columns.items()} | {"label_sets": label_sets}


def _keys_of_labels(sums: Sums, rows: int) -> dict[str, NDArray | pa.Array]:
    """Returns the columns sample, label and is_special, with `rows` rows for each sample and label."""
    samples, labels = sums.tokens_SL.shape
    label = np.tile(np.repeat(np.arange(labels, dtype=np.int32), rows), samples)
    return {
        "stack": np.repeat(np.arange(samples, dtype=np.int32), labels * rows),
        "label": pa.DictionaryArray.from_arrays(pa.array(label), pa.array(sums.labels)),
        "is_special": np.zeros(len(label), bool),
    }


def _with_constants(columns: dict[str, NDArray | pa.Array], constants: Mapping[str, int]) -> pa.Table:
    rows = len(columns["stack"])
    return pa.table(columns | {name: np.full(rows, value, np.int32) for name, value in constants.items()})
