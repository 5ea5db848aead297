"""Makes the rollup of a run: counts shard by shard, in one pass over the committed files.

Guarantees: memory holds a few shards and 128 MB of counts, whatever the size of the run, plus a few numbers per label,
router and expert; files of a remote run are fetched one shard at a time, while the previous one is counted. Each file
appears whole or not at all, and the rollup counts only once the second exists. Nothing of the run is changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from collector.pipeline import Pipeline, Stage
from collector.query.rollup import counting
from collector.query.rollup.files import DOCUMENTS, LABELS, SCHEMAS, STATISTICS, Covered
from collector.store import tables
from collector.store.run_directory import RUN

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from collector.query.rollup.counting import ShardCounts
    from collector.store.run_directory import Commit, RunDirectory
    from collector.store.tables import Layer

_GATHERED = 128 * 2**20
"""Bytes of counts to gather before writing them router by router, so that row groups are neither few nor tiny."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """Files and size of a new rollup."""

    files: dict[str, str]
    """Files by relation."""
    bytes: int
    shards: int
    tokens: int
    """Tokens that the model processed."""


def make(run: RunDirectory, progress: Callable[[int, int], None] = lambda _done, _all: None) -> Made:
    """Counts the shards committed so far and publishes the rollup, replacing one of the same commits.

    Args:
        run: the run directory.
        progress: called after each shard with the number of shards done and the total.

    Raises:
        FileNotFoundError: there is no run, or a committed file is missing.
        DamagedRecordError: a commit record cannot be read.
    """
    info = run.read_json(RUN)
    layers, lacks = tables.recorded_layers(info), tables.lacking(info)
    covered, labels, of = Covered(), _Labels(), len(run.committed_shards())
    shards = tokens = 0
    pipeline = Pipeline(Stage(name="fetch", step=lambda commit: _fetch(run, commit)),
                        Stage(name="count", step=lambda fetched: _count(fetched, layers, lacks)))  # fmt: skip
    with run.scratch() as scratch:
        paths = {relation: Path(scratch, relation) for relation in SCHEMAS}
        with contextlib.closing(pipeline), _Documents(paths[DOCUMENTS]) as documents:
            for commit, label_d, counted in pipeline.map(run.commits()):
                covered.add(commit)
                for counts in counted:
                    documents.add(counts)
                    labels.add(counts, label_d)
                shards, tokens = shards + 1, tokens + commit.tokens
                progress(shards, of)
        _write(paths[LABELS], labels.table())
        size = sum(path.stat().st_size for path in paths.values())
        for relation, name in covered.names().items():  # in this order: see `files`
            run.store.publish(paths[relation], name)
    return Made(files=covered.names(), bytes=size, shards=shards, tokens=tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Fetched:
    commit: Commit
    folder: tempfile.TemporaryDirectory[str]
    paths: dict[str, Path]


def _fetch(run: RunDirectory, commit: Commit) -> _Fetched:
    """First stage: fetches the files of a shard."""
    folder = tempfile.TemporaryDirectory(prefix="collector-rollup-")
    needed = ("routing", "tokens", "documents")
    paths = {table: run.store.local_copy(commit.files[table].path, Path(folder.name)) for table in needed}
    return _Fetched(commit=commit, folder=folder, paths=paths)


def _count(
    fetched: _Fetched, layers: Sequence[Layer], lacks: Sequence[str]
) -> tuple[Commit, NDArray, list[ShardCounts]]:  # fmt: skip
    """Second stage: returns the commit, the label of each document, and the counts of each router."""
    with fetched.folder:
        tokens = pq.read_table(fetched.paths["tokens"], columns=["tok", "doc"])
        documents = pq.read_table(fetched.paths["documents"], columns=["doc", "label"])
        doc_t = np.empty(len(tokens), np.int64)
        doc_t[tokens["tok"].to_numpy()] = tokens["doc"].to_numpy()
        label_d = np.empty(len(documents), object)
        label_d[documents["doc"].to_numpy()] = documents["label"].to_pylist()
        shard = fetched.commit.shard
        counted = [counting.count(shard, layer, fetched.paths["routing"], doc_t, lacks) for layer in layers]
    return fetched.commit, label_d, counted


class _Documents:
    """Writes the file of documents: each row group holds one router, over as many shards as memory allows."""

    def __init__(self, path: Path) -> None:
        self._writer = _writer(path, SCHEMAS[DOCUMENTS])
        self._gathered: dict[Layer, list[pa.Table]] = defaultdict(list)
        self._bytes = 0

    def __enter__(self) -> _Documents:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()

    def add(self, counts: ShardCounts) -> None:
        table = counts.table()
        self._gathered[counts.layer].append(table)
        self._bytes += table.nbytes
        if self._bytes > _GATHERED:
            self._flush()

    def _flush(self) -> None:
        for gathered in self._gathered.values():
            table = pa.concat_tables(gathered)
            self._writer.write_table(table, row_group_size=max(1, len(table)))
        self._gathered.clear()
        self._bytes = 0


class _Labels:
    """Sums the counts of every expert over documents, per router, label and whether tokens are special."""

    def __init__(self) -> None:
        self._sums: dict[tuple[Layer, str, bool], NDArray[np.float64]] = {}

    def add(self, counts: ShardCounts, label_d: NDArray) -> None:
        """Adds a shard's counts of one router; `label_d` names the label of each document."""
        e = counts.layer.n_experts
        names, label_g = np.unique(label_d[counts.doc_g].astype(str), return_inverse=True)
        cell_n = (2 * label_g + counts.is_special_g)[counts.group_n] * e + counts.expert_n
        size = 2 * len(names) * e
        found = [counts.picks_n, counts.top1_n, counts.weight_sum_n]
        columns = [np.full(size, np.nan) if each is None else np.bincount(cell_n, each, size) for each in found]
        sums = np.stack(columns, axis=1).reshape(len(names), 2, e, 3)
        for i, special in np.argwhere(sums[:, :, :, 0].any(axis=2)).tolist():
            key = (counts.layer, str(names[i]), bool(special))
            self._sums[key] = self._sums.get(key, 0) + sums[i, special]

    def table(self) -> pa.Table:
        """Returns all nonzero sums, sorted by router, label, is_special and expert."""
        rows = sorted(
            (layer.stack, layer.layer, label, special, expert, *sums[expert].tolist())
            for (layer, label, special), sums in self._sums.items()
            for expert in np.flatnonzero(sums[:, 0]).tolist()
        )
        schema = SCHEMAS[LABELS]
        arrays = [
            pa.array([None if row[i] != row[i] else row[i] for row in rows], kind)  # NaN: not known
            for i, kind in enumerate(schema.types)
        ]
        return pa.Table.from_arrays(arrays, schema=schema)


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Opens a writer with encodings chosen by measurement, as for `routing`: dictionaries for names, byte streams."""
    return pq.ParquetWriter(
        path, schema, compression=tables.COMPRESSION, compression_level=tables.COMPRESSION_LEVEL,
        use_dictionary=["stack", "layer", "shard", "label", "tokens", "expert", "experts.list.element",
                        "picks.list.element", "top1.list.element"],
        use_byte_stream_split=[*STATISTICS, "weight_sums.list.element", "weight_sum"],
        column_encoding={"doc": "DELTA_BINARY_PACKED"}, write_statistics=["shard", "stack", "layer", "label"],
    )  # fmt: skip


def _write(path: Path, table: pa.Table) -> None:
    with _writer(path, table.schema) as writer:
        writer.write_table(table)
