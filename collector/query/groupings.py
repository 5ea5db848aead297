"""Chooses the meaning of `label` in all queries: the recorded label, or a group of documents or tokens.

A grouping is one SQL file of `queries/groupings/`: a select that gives the group of each document (shard, doc, label)
or of each token (shard, tok, label). Its header says which of the two (`Groups:`), and which relations it requires
(`Needs:`). If a run is opened with a grouping, some views are replaced by those of `queries/views/by_document/` or
`by_token/`, in which the base relation of the same name is called `recorded_…`. If there is a rollup, the views of
`rollup/` and `label_rollup/` replace those that would count again.

A view may need what only some runs record (`Needs:` in its header), or labels of whole documents (`Groups:`). Where it
cannot be, it is left out, and queries that read it say why.
"""

from __future__ import annotations

import dataclasses
import graphlib
from typing import TYPE_CHECKING

from collector.capture.recorders import recorder_of
from collector.query.catalog import query_folder, read_header, split_names

if TYPE_CHECKING:
    from collections.abc import Container, Mapping
    from pathlib import Path

LABEL = "label"
"""Name for no grouping: the label as it was recorded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grouping:
    """One file of `queries/groupings/`."""

    name: str
    question: str
    of: str
    """What it groups: `document` or `token`."""
    needs: tuple[str, ...]
    """Base relations that it requires."""
    sql: str
    option: str = "--by"
    """Option of the command line that chooses it."""


def find_grouping(name: str) -> Grouping | None:
    """Returns the grouping of this name, None for the recorded label.

    Raises:
        ValueError: there is none; the message lists all groupings.
    """
    if name == LABEL:
        return None
    path = _folder() / f"{name}.sql"
    names = [LABEL, *sorted(path.stem for path in _folder().glob("*.sql"))]
    if name not in names:
        raise ValueError(f"no grouping {name!r}; runs are grouped by {', '.join(names)}")
    sql = path.read_text(encoding="utf-8").strip()
    header = read_header(sql)
    return Grouping(
        name=name, question=header["question"], of=header["groups"].removesuffix("s"),
        needs=split_names(header["needs"]) if "needs" in header else (), sql=sql,
    )  # fmt: skip


def derived_views(
    grouping: Grouping | None, *, rollup: bool, recorded: Container[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the views over the base relations, each after those that it reads, and those that this run cannot have.

    Args:
        grouping: what `label` means.
        rollup: whether the relations `document_rollup` and `label_rollup` exist.
        recorded: the tables that recorders write for the run, and their columns as `TABLE.COLUMN`.

    Returns:
        The selects by name, and for each view that is left out what it needs.
    """
    selects: dict[str, str] = {}
    for folder in _variants(grouping, rollup=rollup):
        selects |= read_views(query_folder() / "views" / folder)
    absent = {}
    for name, select in selects.items():
        header = read_header(select)
        if missing := [need for need in split_names(header.get("needs", "")) if need and need not in recorded]:
            absent[name] = f"which needs what {option_for(missing[0])} keeps; this run was collected without"
        elif grouping is not None and grouping.of == "token" and header.get("groups") == "documents":
            absent[name] = f"which sums over whole documents; {grouping.option} {grouping.name} groups single tokens"
    selects |= {} if grouping is None else {f"{grouping.of}_groups": grouping.sql}
    return in_order({name: select for name, select in selects.items() if name not in absent}), absent


def option_for(recorded: str) -> str:
    """Returns the option of `collector collect` that a table is recorded with, or a column as `TABLE.COLUMN`."""
    return "--generate" if recorded == "documents.prompt_tokens" else f"--record {recorder_of(recorded)}"


def read_views(folder: Path) -> dict[str, str]:
    """Returns the selects in the files of a folder, by name."""
    return {path.stem: path.read_text(encoding="utf-8").strip() for path in folder.glob("*.sql")}


def in_order(selects: Mapping[str, str]) -> dict[str, str]:
    """Sorts views so that each comes after those that it reads."""
    reads = {name: reads_of(select) for name, select in sorted(selects.items())}
    return {name: selects[name] for name in graphlib.TopologicalSorter(reads).static_order() if name in selects}


def reads_of(select: str) -> tuple[str, ...]:
    """Returns the relations that a view reads according to its header."""
    return split_names(read_header(select)["reads"])


def _variants(grouping: Grouping | None, *, rollup: bool) -> list[str]:
    """Returns folders of views; views of later folders replace those of the same name in earlier ones."""
    folders = [""] if grouping is None else ["", f"by_{grouping.of}"]
    if rollup and (grouping is None or grouping.of == "document"):  # a rollup counts whole documents
        folders.append("rollup")
    if rollup and grouping is None:
        folders.append("label_rollup")
    return folders


def _folder() -> Path:
    return query_folder() / "groupings"
