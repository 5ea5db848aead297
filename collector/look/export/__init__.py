"""Exports a run for other programs: a dataset for the Hugging Face hub, Delta tables, or CSV files.

Guarantees: a row is exported once if a commit record names its file, and not at all otherwise; memory does not grow
with the run; the folder appears as a whole, under its name, or not at all. A run on an object store is read in place;
the folder is always local. An incomplete run must be requested explicitly. Nothing is published: a run is as private as
its text, and each folder contains a card that says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import uuid
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from collector.capture.recorders import table_names
from collector.look.export import card, hub, streams
from collector.query.warehouse import open_run

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

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
    target = _new_folder(out)
    run = open_run(directory.root)
    if not run.complete and not partial:
        raise ValueError(f"{directory.root} is incomplete; --partial exports what is committed so far")
    with _built_beside(target) as folder:
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
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Exported(rows=rows, bytes=size)


def _new_folder(out: str) -> Path:
    if "://" in out:
        raise ValueError(f"an export goes to a local folder, got {out}; copy that to the store with its own client")
    target = Path(out).absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder: give another one, or remove it")
    return target


@contextlib.contextmanager
def _built_beside(target: Path) -> Iterator[Path]:
    """Yields a temporary folder next to `target`; renames it to `target` at the end, or removes it after an error."""
    folder = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
