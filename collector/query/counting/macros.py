"""Replaces macros, for the query that calls them, by rows that numpy computes.

Statements other than queries, and the script of the views, keep the macros, whose SQL defines the rows.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from collector.query.catalog import query_folder
from collector.query.counting import neighbour_counts, pair_counts, token_counts
from collector.query.counting.rows import Asked
from collector.store import tables

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import duckdb

    from collector.query.catalog import Query, Value
    from collector.store.tables import Layer

_COMPUTED = {"token_counts": token_counts, "pair_counts": pair_counts, "neighbour_counts": neighbour_counts}


def provide(
    cursor: duckdb.DuckDBPyConnection, query: Query, values: Mapping[str, Value], layers: Sequence[Layer], *,
    has_weights: bool,
) -> None:  # fmt: skip
    """Computes what the macros that a query calls return, and shows the cursor that instead of the macros.

    Args:
        cursor: where the query will run.
        query: the query.
        values: its parameters.
        layers: the run's routers.
        has_weights: whether the run has weights.
    """
    routers = tables.asked_layers(layers, values)
    for name, module in _COMPUTED.items():
        if f" {name}(" in query.sql:
            asked = Asked(cursor=cursor, query=query, values=values, routers=routers, has_weights=has_weights)
            cursor.register(f"computed_{name}", module.rows(asked))
            cursor.execute(f"create temp macro {_signature(name)} as table from computed_{name}")


def _signature(name: str) -> str:
    """Returns the name and parameters of a macro."""
    sql = (query_folder() / "macros" / f"{name}.sql").read_text(encoding="utf-8")
    found = re.search(r"create or replace macro (.*?) as table", sql, re.DOTALL)
    assert found is not None, name
    return found[1]
