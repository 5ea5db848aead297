"""Reads the arms of an intervention: sets of edits of the routing, from a file or by name.

A file is CSV, or SQL over the views of the run whose experts are edited, and over answers (see `expert_sql`). Its rows
are edits: `arm` (the name of the set), `layer`, `expert`, `operation`, and optionally `stack` (default decoder),
`value`, and what they are limited to: `label`, `token_class`, `position`. Named arms are the SQL files of
`queries/arms/`. A JSON file holds sets of experts (see `expert_sets`), of which each is an arm that drops them.
"""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collector.models.edits import Arm, Edit, read, tell
from collector.query.expert_sets import read_sets
from collector.query.expert_sql import TEST, named_arms, named_sql, rows_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from collector.query.warehouse import Run

_NEEDED = ("arm", "layer", "expert", "operation")
_OPTIONAL = ("stack", "value", "label", "token_class", "position")


def read_arms(run: Run, source: str, *, split: bool = False) -> list[Arm]:
    """Returns the arms of a file, or of a name.

    Args:
        run: whose views SQL reads.
        source: a file that ends with .csv, .sql or .json, or the name of one in `queries/arms/`.
        split: whether `specialization_test` reads the first half of the documents only, see `selection`.

    Raises:
        FileNotFoundError: there is no such file or name.
        ValueError: the SQL or an edit is invalid, the rows lack a column or are none, sets are of another model or of
            experts that the run does not have, or there is nothing that could read a half.
    """
    answers: set[str] = set()
    if source.endswith(".json"):
        arms = read_sets(Path(source)).arms_for(run)
    elif source.endswith(".csv"):
        arms = _grouped(_csv_rows(Path(source)), source)
    else:
        rows, answers = rows_of(run, _statement(source), f"--arms {source}", split=split)
        arms = _grouped(rows, source)
    if split and TEST not in answers:
        raise ValueError(f"--split tests experts in half of the documents, and --arms {source} does not read {TEST}")
    return arms


def _statement(source: str) -> str:
    try:
        return Path(source).read_text(encoding="utf-8") if source.endswith(".sql") else named_sql(source)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"--arms {source}: no such file; name a CSV, SQL or JSON file, or one of {', '.join(named_arms())}"
        ) from error


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
