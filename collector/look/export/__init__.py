"""Writes a run for other programs: a data set for the Hugging Face hub, Delta tables, or CSV files.

Guarantees: a row is exported once if a commit record names its file, and not at all otherwise; memory does not grow
with the run; the folder appears whole, under its name, or not at all. A run on an object store is read where it lies;
the folder is always a local one. An incomplete run has to be asked for. Nothing is published: a run is as private as
its text, and each folder carries a card that says so.
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
    """What an export wrote."""

    rows: Mapping[str, int]
    """Table -> rows."""
    bytes: int
    """Size of all files of the folder; those that are hard links take no room of their own."""


def export(directory: RunDirectory, out: str, to: Format, *, gzip: bool = False, partial: bool = False) -> Exported:
    """Writes a run into a new folder.

    Args:
        directory: the run, local or on an object store.
        out: the folder, which is not there yet or empty.
        to: `hf`, a folder ready to be pushed to the hub, which is a run as well; `delta`, a Delta table per table;
            `csv`, a CSV file per table.
        gzip: compress the CSV files.
        partial: also export what is there of an incomplete run.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: `out` is taken or not local, the run is incomplete, or its files do not hold the rows that its
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
        raise ValueError(f"{target} is there already and not an empty folder: give another one, or remove it")
    return target


@contextlib.contextmanager
def _built_beside(target: Path) -> Iterator[Path]:
    """A temporary folder next to `target`, which takes its name at the end; after an error it is gone."""
    folder = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check(rows: Mapping[str, int], directory: RunDirectory, tables: tuple[str, ...]) -> None:
    """Every table has the rows that the commit records count."""
    committed = Counter[str]()
    for commit in directory.commits():
        committed.update({table: part.rows for table, part in commit.files.items()})
    for table in tables:
        if rows.get(table, 0) != committed[table]:
            raise ValueError(
                f"{directory.root}: the files of {table} hold {rows.get(table, 0):,} rows, their commit records "
                f"promise {committed[table]:,}; `collector verify` says which shards are damaged"
            )
