"""Gives queries relations that are computed in numpy when a query asks for them, with the query's parameters.

Each computes what SQL can only do slowly, or not in bounded memory. Its rows carry the parameters that they were
computed with, and the query selects by them, so that a statement says all that it depends on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from collector.query.placements import relation as placements
from collector.query.relations import caches, neighbours, paths

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import duckdb
    import pyarrow as pa

    from collector.query.catalog import Query, Value
    from collector.store.tables import Layer

    Rows = Callable[[duckdb.DuckDBPyConnection, Sequence[Layer], Mapping[str, Value]], pa.Table]

_RELATIONS: dict[str, Rows] = {each.NAME: each.rows for each in (caches, neighbours, paths, placements)}


def provide(
    cursor: duckdb.DuckDBPyConnection, query: Query, layers: Sequence[Layer], values: Mapping[str, Value]
) -> None:
    """Computes those that a query reads, and makes them visible to the cursor.

    Args:
        cursor: where the query will run.
        query: the query.
        layers: the run's routers.
        values: the query's parameters.

    Raises:
        ValueError: a relation cannot be computed with these parameters.
    """
    for name in query.reads:
        if name in _RELATIONS:
            cursor.register(name, _RELATIONS[name](cursor, layers, values))
