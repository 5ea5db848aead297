"""Selects documents of a run, and finds the rows of the data that they came from.

A run can be split in two halves: of each label every other document, in the order of the run. What is chosen in one
half and measured in the other is not flattered by the choice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import duckdb
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Collection

    from collector.data.plan import Plan, Shard
    from collector.query.warehouse import Run


ALL = "from documents"


def half(run: Run, *, first: bool) -> set[tuple[int, int]]:
    """Returns shard and number of the documents of one half."""
    return {(shard, doc) for shard, doc, is_first in run.sql("from halves").fetchall() if is_first == first}


def selected_rows(
    run: Run, plan: Plan, statement: str, *, only: Collection[tuple[int, int]] | None = None
) -> dict[int, list[int]]:  # fmt: skip
    """Returns the rows of the documents that SQL over the run's views selects, by shard of the run's plan.

    Args:
        run: with the documents.
        plan: of the run.
        statement: SQL whose result has the columns `shard` and `doc`.
        only: take only these of them.

    Raises:
        ValueError: the SQL is invalid, lacks a column, or selects no document.
    """
    relation = run.sql(statement.strip().rstrip(";"))
    if missing := [name for name in ("shard", "doc") if name not in relation.columns]:
        raise ValueError(
            f"--documents needs the columns shard and doc, and its SQL has no {' and no '.join(missing)}: "
            "from documents where label = 'kor_Hang'"
        )
    try:
        pairs = sorted(relation.project("shard::bigint, doc::bigint").distinct().fetchall())
    except duckdb.Error as error:
        raise ValueError(f"--documents: {str(error).splitlines()[0]}") from error
    pairs = [pair for pair in pairs if only is None or pair in only]
    if not pairs:
        raise ValueError(f"--documents {statement!r} selects no document")
    rejected: dict[int, set[int]] = {}
    for shard, row in run.sql('select shard, "row" from rejects').fetchall():
        rejected.setdefault(shard, set()).add(row)
    documents = dict(run.sql("select shard, count(*) from documents group by shard").fetchall())
    by_shard: dict[int, list[int]] = {}
    for shard, doc in pairs:
        by_shard.setdefault(shard, []).append(doc)
    planned = {shard.shard: shard for shard in plan.shards}
    found: dict[int, list[int]] = {}
    for shard, docs in by_shard.items():
        rows = [] if shard not in planned else _good(planned[shard], rejected.get(shard, set()))
        if len(rows) != documents.get(shard) or min(docs) < 0 or max(docs) >= len(rows):
            raise ValueError(f"--documents selects documents of shard {shard} that the run does not have")
        found[shard] = [int(rows[doc]) for doc in docs]
    return found


def _good(shard: Shard, rejected: set[int]) -> list[int]:
    """The rows that became documents, in their order."""
    rows = np.arange(shard.first_row, shard.first_row + shard.rows).tolist() if shard.keep is None else shard.keep
    return [row for row in rows if row not in rejected]
