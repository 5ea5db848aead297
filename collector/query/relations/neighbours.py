"""Gives queries the relation `neighbours`: which documents are routed most like each document.

A document's signature is the shares of its picks that each expert got, router after router. Documents are compared by
the cosine of their signatures: one document with all others, or all with each other. Of too many for that a random
sample is compared.

There is a row for each document in question and each other, with the other's rank, for the first of them; and one of
rank 0, without another document, for each document that was compared. `mean_cosine` is that of all other documents.

Guarantees: one router is in memory at a time, and a number for each pair of documents that are compared.

Axes: D documents that are compared, Q of which the neighbours are asked for; E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from collector.store import tables

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import duckdb
    from numpy.typing import NDArray

    from collector.query.catalog import Value
    from collector.store.tables import Layer

NAME = "neighbours"
_DOCUMENT = "(shard::bigint << 32) + doc as document"
_COUNTS = f"""
select {_DOCUMENT}, label, experts, picks
from filtered('document_counts', $stack, $layer, $labels, $include_special)
order by document, is_special
"""
_NAMES = f"select {_DOCUMENT}, doc_id, label from documents order by document"
_ROUNDED = 12
"""Digits of a cosine: documents that are routed alike are then equally near, and come in the order of the run."""
_SCHEMA = pa.schema(
    [
        ("asked_stack", pa.string()), ("asked_layer", pa.int32()), ("labels", pa.list_(pa.string())),
        ("include_special", pa.bool_()), ("asked_document", pa.string()), ("most", pa.int32()),
        ("all_documents", pa.int64()), ("shard", pa.int64()), ("doc", pa.int64()), ("document", pa.string()),
        ("label", pa.string()), ("rank", pa.int64()), ("other_shard", pa.int64()), ("other_doc", pa.int64()),
        ("other_document", pa.string()), ("other_label", pa.string()), ("cosine", pa.float64()),
        ("mean_cosine", pa.float64()),
    ]
)  # fmt: skip


def rows(cursor: duckdb.DuckDBPyConnection, layers: Sequence[Layer], values: Mapping[str, Value]) -> pa.Table:
    """Computes the rows.

    Args:
        cursor: where the query will run.
        layers: the run's routers.
        values: the query's parameters: n, the neighbours of a document; document, its id (null: all); most, how many
            documents are compared with each other; and stack, layer, labels and include_special as usual.

    Raises:
        ValueError: labels are groups of tokens, so that a document has several.
    """
    asked = tables.asked_layers(layers, values)
    compared: _Compared | None = None
    for router in asked:
        counted = cursor.sql(_COUNTS, params=_where(router, values)).to_arrow_table()
        if compared is None:
            _require_document_labels(counted)
            compared = _Compared(*_chosen(cursor, np.unique(counted["document"].to_numpy()), values))
        compared.add(counted, router.n_experts)
    given: dict[str, Any] = {
        "asked_stack": values["stack"], "asked_layer": values["layer"], "labels": values["labels"],
        "include_special": values["include_special"], "asked_document": values["document"], "most": values["most"],
    }  # fmt: skip
    found = [] if compared is None else list(compared.rows(int(values["n"])))  # type: ignore[arg-type]
    given["all_documents"] = sum(row["rank"] == 0 for row in found)
    return pa.Table.from_pylist([given | row for row in found], schema=_SCHEMA)


def _where(router: Layer, values: Mapping[str, Value]) -> dict[str, Value]:
    chosen = {name: values[name] for name in ("labels", "include_special")}
    return {"stack": router.stack, "layer": router.layer, **chosen}


def _require_document_labels(counted: pa.Table) -> None:
    pairs = counted.select(["document", "label"]).group_by(["document", "label"]).aggregate([])
    if pairs.num_rows > len(np.unique(pairs["document"].to_numpy())):
        raise ValueError("documents have tokens of several labels here: nearest_documents takes labels of documents")


def _chosen(
    cursor: duckdb.DuckDBPyConnection, document_D: NDArray[np.int64], values: Mapping[str, Value]
) -> tuple[NDArray[np.int64], NDArray[np.intp], list[tuple[str, str]]]:
    """Returns the documents to compare, [D], of which the neighbours are asked for, [Q], and ids and labels of all."""
    most = int(values["most"])  # type: ignore[arg-type]
    if values["document"] is None and len(document_D) > most:
        document_D = np.sort(np.random.default_rng(0).choice(document_D, most, replace=False))
    names = cursor.sql(_NAMES).to_arrow_table()
    names = names.filter(np.isin(names["document"].to_numpy(), document_D))
    ids = names["doc_id"].to_pylist()
    asked = [place for place, name in enumerate(ids) if values["document"] in (None, name)]
    return document_D, np.array(asked, np.intp), [*zip(ids, names["label"].to_pylist(), strict=True)]


class _Compared:
    """Documents, and what their signatures add up to over routers."""

    def __init__(
        self, document_D: NDArray[np.int64], asked_Q: NDArray[np.intp], names: Sequence[tuple[str, str]]
    ) -> None:
        self._document_D, self._asked_Q, self._names = document_D, asked_Q, names
        self._products_QD = np.zeros((len(asked_Q), len(document_D)))
        self._squares_D = np.zeros(len(document_D))

    def add(self, counted: pa.Table, experts: int) -> None:
        """Adds a router; a document of which it saw no token is 0 there."""
        counted = counted.filter(np.isin(counted["document"].to_numpy(), self._document_D))
        place_R = np.searchsorted(self._document_D, counted["document"].to_numpy())
        lists = {name: counted[name].combine_chunks() for name in ("experts", "picks")}
        cells = np.repeat(place_R, lists["experts"].value_lengths().to_numpy()) * experts
        cells += lists["experts"].flatten().to_numpy()
        picks = np.bincount(cells, lists["picks"].flatten().to_numpy(), len(self._document_D) * experts)
        picks_DE = picks.reshape(-1, experts)
        share_DE = picks_DE / np.maximum(picks_DE.sum(axis=1, keepdims=True), 1)
        self._products_QD += share_DE[self._asked_Q] @ share_DE.T
        self._squares_D += (share_DE**2).sum(axis=1)

    def rows(self, n: int) -> Iterator[dict[str, Any]]:
        """Yields the rows of all documents, and those of the first n neighbours of each that was asked for."""
        for place in range(len(self._document_D)):
            yield {**self._named(place), "rank": 0}
        lengths_D, others = np.sqrt(self._squares_D), len(self._document_D) - 1
        for place, products_D in zip(self._asked_Q.tolist(), self._products_QD, strict=True):
            cosine_D = np.round(products_D / (lengths_D[place] * lengths_D), _ROUNDED)
            mean = (cosine_D.sum() - cosine_D[place]) / max(others, 1)
            cosine_D[place] = -np.inf
            for rank, other in enumerate(np.argsort(-cosine_D, kind="stable")[: min(n, others)].tolist(), start=1):
                neighbour = {f"other_{key}": value for key, value in self._named(other).items()}
                found = {"rank": rank, "cosine": float(cosine_D[other]), "mean_cosine": float(mean)}
                yield self._named(place) | neighbour | found

    def _named(self, place: int) -> dict[str, Any]:
        number, (document, label) = int(self._document_D[place]), self._names[place]
        return {"shard": number >> 32, "doc": number & (1 << 32) - 1, "document": document, "label": label}
