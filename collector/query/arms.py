"""Reads the arms of an intervention: sets of edits of the routing, from a file or by name.

A file is CSV, or SQL over the views of the run whose experts are edited. Its rows are edits: `arm` (the name of the
set), `layer`, `expert`, `operation`, and optionally `stack` (default decoder), `value`, and what they are limited to:
`label`, `token_class`, `position`. Named arms are the SQL files of `queries/arms/`.

SQL may also read answers: any query by its name, with its defaults, and `specialization_test`, the rows of
`collector test`.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from collector.models.edits import Arm, parse
from collector.query.catalog import list_queries, query_folder
from collector.query.document_counts import document_counts
from collector.query.inference import specialization_test
from collector.query.selection import half

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import pyarrow as pa

    from collector.query.document_counts import DocumentCounts
    from collector.query.warehouse import Run

TEST = "specialization_test"
_READ = re.compile(r"\b(?:from|join)\s+(\w+)", re.IGNORECASE)
_ALL_ROWS = 2**31 - 1
_NEEDED = ("arm", "layer", "expert", "operation")
_ALL = (*_NEEDED, "stack", "value", "label", "token_class", "position")


def read_arms(run: Run, source: str, *, split: bool = False) -> list[Arm]:
    """Returns the arms of a file, or of a name.

    Args:
        run: whose views SQL reads.
        source: a file that ends with .csv or .sql, or the name of one in `queries/arms/`.
        split: whether `specialization_test` reads the first half of the documents only, see `selection`.

    Raises:
        FileNotFoundError: there is no such file or name.
        ValueError: the SQL or an edit is invalid, the rows lack a column or are none, or there is nothing that could
            read a half.
    """
    path = Path(source)
    answers: dict[str, pa.Table] = {}
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            rows: list[dict[str, Any]] = list(csv.DictReader(file))
    else:
        statement = _statement(source).rstrip().rstrip(";")
        answers = _answers(run, statement, split=split)
        relation = run.sql(statement, answers)
        rows = [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()]
    if split and TEST not in answers:
        raise ValueError(f"--split tests experts in half of the documents, and --arms {source} does not read {TEST}")
    return list(_grouped(rows, source))


def named_arms() -> list[str]:
    """Returns the names of the arms in `queries/arms/`."""
    return sorted(path.stem for path in (query_folder() / "arms").glob("*.sql"))


def _statement(source: str) -> str:
    path = Path(source) if source.endswith(".sql") else query_folder() / "arms" / f"{source}.sql"
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"--arms {source}: no such file; name a CSV or SQL file, or one of {', '.join(named_arms())}"
        ) from error


def _answers(run: Run, statement: str, *, split: bool) -> dict[str, pa.Table]:
    """The answers that a statement reads."""
    found: dict[str, pa.Table] = {}
    queries = {query.name: query for query in list_queries() if not query.of_two_runs}
    for name in sorted(set(_READ.findall(statement))):
        if name == TEST:
            counts = document_counts(run)
            found[name] = specialization_test(_first_half(run, counts) if split else counts)
        elif name in queries:
            every = {"top": _ALL_ROWS} if "top" in {param.name for param in queries[name].params} else {}
            found[name] = run.query(name, **every).to_arrow_table()
    return found


def _first_half(run: Run, counts: Iterable[DocumentCounts]) -> Iterable[DocumentCounts]:
    documents = half(run, first=True)
    for one in counts:
        places = zip(one.shard_D.tolist(), one.doc_D.tolist(), strict=True)
        yield one.of(np.array([place in documents for place in places], bool))


def _grouped(rows: Iterable[Mapping[str, Any]], source: str) -> Iterable[Arm]:
    edits: dict[str, list[str]] = {}
    for row in rows:
        if missing := [name for name in _NEEDED if row.get(name) in (None, "")]:
            raise ValueError(f"--arms {source}: a row lacks {' and '.join(missing)}; it has {', '.join(row)}")
        parts = [f"{name}={quote(str(row[name]), safe='')}" for name in _ALL[1:] if row.get(name) not in (None, "")]
        edits.setdefault(str(row["arm"]), []).append(" ".join(parts))
    if not edits:
        raise ValueError(f"--arms {source}: it names no edit")
    return (Arm(name=name, edits=tuple(map(parse, own))) for name, own in edits.items())
