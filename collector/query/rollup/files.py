"""Names the two files of a rollup, defines their columns, and finds out whether a rollup is current.

    rollup/documents-<digest>.parquet    one row per document, router and whether tokens are special
    rollup/assignments-<digest>.parquet  one row per label, router, expert and whether tokens are special

The digest covers the counted commits, so the names alone show whether a rollup matches the commit records of a run.
Guarantees: a rollup of other commits, or in another layout, is never mistaken for a current one; the documents are
published before the assignments, so an interrupted rollup does not count as one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from collector.store.commits import Attempts
from collector.store.run_directory import ROLLUP

if TYPE_CHECKING:
    from collections.abc import Iterable

    from collector.store.run_directory import RunDirectory

DOCUMENTS, LABELS = "document_rollup", "label_rollup"
"""Relations under which the views read the two files."""
_LAYOUT = 1
"""Version of the layout; it is part of the digest."""
_STACK = pa.dictionary(pa.int32(), pa.string())


STATISTICS = ("router_entropy", "weight_entropy", "topk_mass", "margin")
"""Columns of the view `decisions` that the rollup sums over tokens."""
_MAY_LACK = {*STATISTICS, "top1", "weight_sum"}
"""Columns that are null in the rollup of an imported run, if its source did not have them."""


def _columns(fields: Iterable[tuple[str, pa.DataType]]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=name in _MAY_LACK) for name, kind in fields])


SCHEMAS = {
    DOCUMENTS: _columns(
        [
            ("stack", _STACK), ("layer", pa.uint8()), ("shard", pa.uint32()), ("doc", pa.uint32()),
            ("is_special", pa.bool_()), ("tokens", pa.uint32()),
            *((name, pa.float32()) for name in STATISTICS),
            ("dropped_picks", pa.uint32()), ("dropped_tokens", pa.uint32()),
            ("experts", pa.list_(pa.uint16())), ("picks", pa.list_(pa.uint32())), ("top1", pa.list_(pa.uint32())),
            ("weight_sums", pa.list_(pa.float32())),
        ]
    ),
    LABELS: _columns(
        [
            ("stack", _STACK), ("layer", pa.uint8()), ("label", pa.string()), ("is_special", pa.bool_()),
            ("expert", pa.int32()), ("picks", pa.int64()), ("top1", pa.int64()), ("weight_sum", pa.float64()),
        ]
    ),
}  # fmt: skip
"""Schema by relation; the views `document_counts` and `assignments` describe the columns."""


class Covered(Attempts):
    """Computes the names of a rollup from the commits that it covers, added in the order of shards."""

    def __init__(self) -> None:
        """Starts without commits."""
        super().__init__(f"rollup layout {_LAYOUT}\n")

    def names(self) -> dict[str, str]:
        """Returns the file names, by relation, of a rollup of the added commits."""
        digest = self.digest()[:16]
        return {DOCUMENTS: f"{ROLLUP}/documents-{digest}.parquet", LABELS: f"{ROLLUP}/assignments-{digest}.parquet"}


def find(run: RunDirectory, covered: Covered) -> dict[str, dict[str, int]]:
    """Returns the run's rollup of exactly these commits, as relation -> file -> bytes; empty if there is none."""
    sizes = {entry.name: entry.size for entry in run.store.entries(ROLLUP)}
    names = covered.names()
    if not set(names.values()) <= sizes.keys():
        return {}
    return {relation: {name: sizes[name]} for relation, name in names.items()}


def current(run: RunDirectory) -> dict[str, str]:
    """Returns the files of the run's rollup by relation; empty if there is none of the current commits.

    Raises:
        DamagedRecordError: a commit record cannot be read.
    """
    covered = Covered()
    for commit in run.commits():
        covered.add(commit)
    return {relation: name for relation, sizes in find(run, covered).items() for name in sizes}
