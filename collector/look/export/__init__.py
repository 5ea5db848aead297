"""Exports a run for other programs: a dataset for the Hugging Face hub, Delta tables, or CSV files.

Guarantees: a row is exported once if a commit record names its file, and not at all otherwise; memory does not grow
with the run; the folder appears as a whole, under its name, or not at all. A run on an object store is read in place;
the folder is always local. An incomplete run must be requested explicitly. Nothing is published: a run is as private as
its text, and each folder contains a card that says so.

`engines` exports what a serving engine wants of a run instead: a placement of its experts.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING, Literal

from collector.capture.recorders import table_names
from collector.look.export import card, hub, streams
from collector.look.export.folders import built_beside, new_folder, size_of
from collector.query.warehouse import open_run

if TYPE_CHECKING:
    from collections.abc import Mapping

    from collector.store.run_directory import RunDirectory

__all__ = ["Exported", "Format", "export"]

Format = Literal["hf", "delta", "csv"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """Rows and size of an export."""

    rows: Mapping[str, int]
    """Rows by table."""
    bytes: int
    """Size of all files in the folder, including hard links, which take no extra space."""


def export(directory: RunDirectory, out: str, to: Format, *, gzip: bool = False, partial: bool = False) -> Exported:
    """Exports a run into a new folder.

    Args:
        directory: the run, local or on an object store.
        out: the folder, which must be new or empty.
        to: `hf`, a folder ready to be pushed to the hub, which is still a run; `delta`, a Delta table per table;
            `csv`, a CSV file per table.
        gzip: compress the CSV files.
        partial: also accept an incomplete run.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: `out` is not empty or not local, the run is incomplete, or its files do not have the rows that its
            commit records promise.
        StoreError: the object store refuses or does not answer.
    """
    target = new_folder(out)
    run = open_run(directory.root)
    if not run.complete and not partial:
        raise ValueError(f"{directory.root} is incomplete; --partial exports what is committed so far")
    with built_beside(target) as folder:
        if to == "hf":
            rows = hub.write(directory, run, folder)
        elif to == "delta":
            rows = streams.write_delta(run, folder)
        else:
            rows = streams.write_csv(run, folder, gzip=gzip)
        if run.complete:
            _check(rows, directory, table_names(run.info))
        text = card.write(directory, run, rows, hub.front_matter(run, rows) if to == "hf" else "")
        (folder / card.NAME).write_text(text, encoding="utf-8")
        size = size_of(folder)
    return Exported(rows=rows, bytes=size)


def _check(rows: Mapping[str, int], directory: RunDirectory, tables: tuple[str, ...]) -> None:
    """Checks that every table has as many rows as the commit records say."""
    committed = Counter[str]()
    for commit in directory.commits():
        committed.update({table: part.rows for table, part in commit.files.items()})
    for table in tables:
        if rows.get(table, 0) != committed[table]:
            raise ValueError(
                f"{directory.root}: the files of {table} hold {rows.get(table, 0):,} rows, their commit records "
                f"promise {committed[table]:,}; `collector verify` says which shards are damaged"
            )
