"""Reads the arms of an intervention: sets of edits of the routing, from a file or by name.

A file is CSV, or SQL over the views of the run whose experts are edited. Its rows are edits: `arm` (the name of the
set), `layer`, `expert`, `operation`, and optionally `stack` (default decoder), `value`, and what they are limited to:
`label`, `token_class`, `position`. Named arms are the SQL files of `queries/arms/`.

SQL may also read answers: any query by its name, with its defaults, and `specialization_test`, the rows of
`collector test`.
"""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np

from collector.models.edits import Arm, Edit, read, tell
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
_ALL_ROWS = 2**31 - 1
_NEEDED = ("arm", "layer", "expert", "operation")
_OPTIONAL = ("stack", "value", "label", "token_class", "position")


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
        rows = _csv_rows(path)
    else:
        statement = _statement(source).rstrip().rstrip(";")
        answers = _answers(run, statement, split=split)
        relation = run.sql(statement, answers)
        columns = [name.lower() for name in relation.columns]
        if len(set(columns)) < len(columns):
            raise ValueError(f"--arms {source}: two columns are called {max(columns, key=columns.count)}")
        rows = [dict(zip(columns, row, strict=True)) for row in relation.fetchall()]
    if split and TEST not in {name.lower() for name in answers}:
        raise ValueError(f"--split tests experts in half of the documents, and --arms {source} does not read {TEST}")
    return _grouped(rows, source)


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


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file, whatever program wrote it: with a mark of the byte order, spaces, or empty rows."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--arms {path}: no such file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--arms {path}: the file is not in UTF-8: {error}") from error
    reader = csv.reader(io.StringIO(text, newline=""))
    header = [name.strip().lower() for name in next(reader, [])]
    rows: list[dict[str, Any]] = []
    for cells in reader:
        stripped = [cell.strip() for cell in cells]
        if len(cells) > len(header) and any(stripped[len(header) :]):
            raise ValueError(
                f"--arms {path}: line {reader.line_num} has more cells than the header: {', '.join(cells)}"
            )
        if any(stripped):
            rows.append(dict(zip(header, stripped, strict=False)))
    return rows


def _grouped(rows: Iterable[Mapping[str, Any]], source: str) -> list[Arm]:
    """Groups edits by arm; both are sorted, because SQL may return rows in any order."""
    edits: dict[str, set[Edit]] = {}
    for number, row in enumerate(rows, 1):
        given = {name: None if _is_nothing(row.get(name)) else row[name] for name in (*_NEEDED, *_OPTIONAL)}
        if missing := [name for name in _NEEDED if given[name] is None]:
            raise ValueError(
                f"--arms {source}: row {number} lacks {' and '.join(missing)}; its columns are {', '.join(row)}"
            )
        name = str(given.pop("arm"))
        try:
            edits.setdefault(name, set()).add(read({key: value for key, value in given.items() if value is not None}))
        except ValueError as error:
            raise ValueError(f"--arms {source}: row {number}, arm {name!r}: {error}") from error
    if not edits:
        raise ValueError(f"--arms {source}: it names no edit")
    try:
        return [Arm(name=name, edits=tuple(sorted(edits[name], key=tell))) for name in sorted(edits)]
    except ValueError as error:
        raise ValueError(f"--arms {source}: {error}") from error


def _is_nothing(value: Any) -> bool:
    return value in (None, "") or (isinstance(value, float) and math.isnan(value))
