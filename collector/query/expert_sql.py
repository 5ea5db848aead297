"""Runs SQL that selects experts: over the views of a run, and over answers.

An answer is any query by its name, with its defaults, or `specialization_test`, the rows of `collector test`. The SQL
files of `queries/arms/` have names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np

from collector.query.catalog import list_queries, query_folder
from collector.query.document_counts import document_counts
from collector.query.inference import specialization_test
from collector.query.selection import half

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pyarrow as pa

    from collector.query.document_counts import DocumentCounts
    from collector.query.warehouse import Run

TEST = "specialization_test"
_ALL_ROWS = 2**31 - 1


def named_arms() -> list[str]:
    """Returns the names of the SQL files in `queries/arms/`."""
    return sorted(path.stem for path in (query_folder() / "arms").glob("*.sql"))


def named_sql(name: str) -> str:
    """Returns the SQL of a name.

    Raises:
        FileNotFoundError: there is no such name.
    """
    return (query_folder() / "arms" / f"{name}.sql").read_text(encoding="utf-8")


def rows_of(
    run: Run, statement: str, where: str, *, split: bool = False
) -> tuple[list[dict[str, Any]], set[str]]:  # fmt: skip
    """Runs a statement.

    Args:
        run: whose views it reads.
        statement: SQL.
        where: the statement in messages.
        split: whether `specialization_test` reads the first half of the documents only, see `selection`.

    Returns:
        The rows, by the names of columns in small letters, and the names of the answers that were read.

    Raises:
        ValueError: the SQL is invalid, or two columns have the same name.
    """
    statement = statement.rstrip().rstrip(";")
    answers = _answers(run, statement, split=split)
    relation = run.sql(statement, answers)
    columns = [name.lower() for name in relation.columns]
    if len(set(columns)) < len(columns):
        raise ValueError(f"{where}: two columns are called {max(columns, key=columns.count)}")
    return [dict(zip(columns, row, strict=True)) for row in relation.fetchall()], {name.lower() for name in answers}


def _answers(run: Run, statement: str, *, split: bool) -> dict[str, pa.Table]:
    """The answers that a statement reads."""
    found: dict[str, pa.Table] = {}
    queries = {query.name: query for query in list_queries() if not query.of_two_runs}
    try:
        with duckdb.connect() as parser:  # an empty one, which follows no view
            written = parser.get_table_names(statement)
    except duckdb.Error:  # which `Run.sql` explains
        written = set()
    for each in sorted(written):
        name = each.lower()
        if name == TEST:
            counts = document_counts(run)
            found[each] = specialization_test(_first_half(run, counts) if split else counts)
        elif name in queries:
            every = {"top": _ALL_ROWS} if "top" in {param.name for param in queries[name].params} else {}
            found[each] = run.query(name, **every).to_arrow_table()
    return found


def _first_half(run: Run, counts: Iterable[DocumentCounts]) -> Iterable[DocumentCounts]:
    documents = half(run, first=True)
    for one in counts:
        places = zip(one.shard_D.tolist(), one.doc_D.tolist(), strict=True)
        yield one.of(np.array([place in documents for place in places], bool))
