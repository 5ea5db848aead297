"""Where a rollup is, whether it is current, and the columns of its two files.

    rollup/documents-<digest>.parquet    one row per document, router and whether tokens are special
    rollup/assignments-<digest>.parquet  one row per label, router, expert and whether tokens are special

The digest is that of the commits that were counted, so that whoever holds the commit records of a run knows by name
whether a rollup is of exactly these. Guarantees: a rollup of other commits, or in another layout, is never taken for a
current one; the documents are published before the assignments, so one that was cut short is none.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pyarrow as pa

from collector.store.run_directory import ROLLUP

if TYPE_CHECKING:
    from collections.abc import Iterable

    from collector.store.run_directory import Commit, RunDirectory

DOCUMENTS, LABELS = "document_rollup", "label_rollup"
"""The relations that the two files are for the views."""
_LAYOUT = 1
"""Another one gives other names."""
_STACK = pa.dictionary(pa.int32(), pa.string())


def _required(fields: Iterable[tuple[str, pa.DataType]]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields])


STATISTICS = ("router_entropy", "weight_entropy", "topk_mass", "margin")
"""Sums over tokens, of what the view `decisions` has per token."""
SCHEMAS = {
    DOCUMENTS: _required(
        [
            ("stack", _STACK), ("layer", pa.uint8()), ("shard", pa.uint32()), ("doc", pa.uint32()),
            ("is_special", pa.bool_()), ("tokens", pa.uint32()),
            *((name, pa.float32()) for name in STATISTICS),
            ("dropped_picks", pa.uint32()), ("dropped_tokens", pa.uint32()),
            ("experts", pa.list_(pa.uint16())), ("picks", pa.list_(pa.uint32())), ("top1", pa.list_(pa.uint32())),
            ("weight_sums", pa.list_(pa.float32())),
        ]
    ),
    LABELS: _required(
        [
            ("stack", _STACK), ("layer", pa.uint8()), ("label", pa.string()), ("is_special", pa.bool_()),
            ("expert", pa.int32()), ("picks", pa.int64()), ("top1", pa.int64()), ("weight_sum", pa.float64()),
        ]
    ),
}  # fmt: skip
"""Relation -> columns; those of documents are told by the view `document_counts`, of labels by `assignments`."""


class Covered:
    """The commits of a run, shown one after the other in the order of shards, and the rollup that counts these."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256(f"rollup layout {_LAYOUT}\n".encode())

    def add(self, commit: Commit) -> None:
        """Shows the next commit."""
        self._hash.update(f"{commit.shard} {commit.attempt}\n".encode())

    def names(self) -> dict[str, str]:
        """Relation -> file of a rollup of what was shown."""
        digest = self._hash.hexdigest()[:16]
        return {DOCUMENTS: f"{ROLLUP}/documents-{digest}.parquet", LABELS: f"{ROLLUP}/assignments-{digest}.parquet"}


def find(run: RunDirectory, covered: Covered) -> dict[str, dict[str, int]]:
    """Relation -> file of the run's rollup -> bytes; empty unless there is one of exactly these commits."""
    sizes = {entry.name: entry.size for entry in run.store.entries(ROLLUP)}
    names = covered.names()
    if not set(names.values()) <= sizes.keys():
        return {}
    return {relation: {name: sizes[name]} for relation, name in names.items()}


def current(run: RunDirectory) -> dict[str, str]:
    """Relation -> file of the run's rollup; empty unless there is one of its commits as they are now.

    Raises:
        DamagedRecordError: a commit record cannot be read.
    """
    covered = Covered()
    for commit in run.commits():
        covered.add(commit)
    return {relation: name for relation, sizes in find(run, covered).items() for name in sizes}
