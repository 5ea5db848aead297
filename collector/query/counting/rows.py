"""Streams what routers decided about tokens, a batch of rows at a time, as arrays.

Axes: T rows of a batch, k experts of a row.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from collector.query.numbering import LABEL_PLACES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import duckdb
    from numpy.typing import NDArray

    from collector.query.catalog import Query, Value
    from collector.store.tables import Layer

BATCH = 40_000
"""Rows of a batch, so that its arrays fit the processor's cache."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Some rows, in the order in which they were recorded."""

    columns: Sequence[NDArray]
    """[T] each, those that were asked for."""
    experts_kt: Sequence[NDArray]
    """k arrays, [T] experts, in the model's own order."""
    weights_kt: Sequence[NDArray]
    """k arrays, [T] weights, or none."""

    def highest(self) -> NDArray:
        """Returns the expert with the highest weight of each token, of shape [T], the first among equals."""
        top_t, highest_t = self.experts_kt[0], self.weights_kt[0]
        for expert_t, weight_t in zip(self.experts_kt[1:], self.weights_kt[1:], strict=True):
            higher_t = weight_t > highest_t
            if higher_t.any():  # never, where a model sorts them
                top_t, highest_t = np.where(higher_t, expert_t, top_t), np.where(higher_t, weight_t, highest_t)
        return top_t


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What a query asks about."""

    cursor: duckdb.DuckDBPyConnection
    """Where the query will run."""
    query: Query
    values: Mapping[str, Value]
    """Its parameters."""
    routers: Sequence[Layer]
    """The routers that it asks about."""
    has_weights: bool
    """Whether the run has weights."""

    def batches(
        self, router: Layer, columns: Sequence[str], *, weights: bool, names: Sequence[str] | None = None
    ) -> Iterator[Batch]:
        """Streams the rows of a router that the query asks about.

        Args:
            router: the router.
            columns: SQL of further columns, see `batches`.
            weights: whether to read weights.
            names: all labels, if the columns read `place`.
        """
        chosen: dict[str, Any] = {name: self.values[name] for name in ("labels", "include_special")}
        if names is not None:
            chosen["names"] = names
        where = "($labels is null or list_contains($labels, label)) and ($include_special or not is_special)"
        return batches(self.cursor, [router], columns, weights=weights, where=where, params=chosen)


def batches(
    cursor: duckdb.DuckDBPyConnection, layers: Sequence[Layer], columns: Sequence[str], *, weights: bool,
    where: str = "true", params: Mapping[str, Any], rows: int = BATCH,
) -> Iterator[Batch]:  # fmt: skip
    """Streams the rows of some routers of one stack.

    Args:
        cursor: a connection to the run's views.
        layers: the routers. One with fewer picks than another has further ones of expert `nobody` and weight -inf.
        columns: SQL of further columns, of `routing`, and `place`, the number of the label in `$names` from 1.
        weights: whether to read weights.
        where: SQL that chooses rows.
        params: parameters of columns and where; `names`, all labels, if they read `place`.
        rows: rows of a batch.
    """
    top_k = max(layer.top_k for layer in layers)
    # A layer with fewer picks than others has nulls beyond them, which arrays cannot represent.
    least = min(layer.top_k for layer in layers)
    experts = [f"e{i}" if i < least else f"coalesce(e{i}::usmallint, {nobody(layers)})" for i in range(top_k)]
    weighed = [f"w{i}" if i < least else f"coalesce(w{i}, '-infinity')" for i in range(top_k) if weights]
    labelled = f"left join {LABEL_PLACES} using (label)" if "names" in params else ""
    # As constants, layers let DuckDB skip row groups.
    numbers = ", ".join(str(layer.layer) for layer in layers)
    found = cursor.sql(
        f"select {', '.join([*columns, *experts, *weighed])} from routing {labelled} "
        f"where stack = $stack and layer in ({numbers}) and {where}",
        params={"stack": layers[0].stack, **params},
    )
    for batch in found.to_arrow_reader(rows):
        arrays = [np.from_dlpack(column) for column in batch.columns]  # to_numpy would import pandas
        first, last = len(columns), len(columns) + top_k
        yield Batch(columns=arrays[:first], experts_kt=arrays[first:last], weights_kt=arrays[last:])


def nobody(layers: Sequence[Layer]) -> int:
    """Returns the placeholder expert for picks that a layer does not have."""
    return max(layer.n_experts for layer in layers)
