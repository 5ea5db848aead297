"""Checks the rollup of a run against its data.

The counts are recomputed while the files of each shard are at hand, with the SQL of the views. That is independent of
the code that makes a rollup, `query.rollup.counting`, which uses numpy. Memory holds one shard's counts at a time, and
sums per label. Only a rollup of exactly the current commits is checked, because no other is ever read.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from collector.query import warehouse
from collector.query.rollup import files
from collector.query.rollup.files import DOCUMENTS, LABELS, SCHEMAS
from collector.store.run_directory import RUN, DamagedRecordError
from collector.upkeep.verify.reading import columns

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from collector.store.run_directory import RunDirectory

_ROUTER = ["stack", "layer"]
_KEYS = {DOCUMENTS: [*_ROUTER, "shard", "doc", "is_special"], LABELS: [*_ROUTER, "label", "is_special", "expert"]}
_COUNTS = ["picks", "top1", "weight_sum"]
_RELATIVE = 1e-4
"""Tolerance for sums of float32 values that are added in another order."""


@contextlib.contextmanager
def open_rollup(run: RunDirectory) -> Iterator[RollupCheck | None]:
    """Yields a check of the run's current rollup; None without one, or if a commit record cannot be read."""
    try:
        names = files.current(run)
    except DamagedRecordError:
        names = {}
    with tempfile.TemporaryDirectory(prefix="collector-verify-") as folder:
        yield RollupCheck(run, names, Path(folder)) if names else None


class RollupCheck:
    """Compares the shards of a run, one after the other, with its rollup."""

    def __init__(self, run: RunDirectory, names: Mapping[str, str], folder: Path) -> None:
        """Fetches the rollup.

        Args:
            run: the run.
            names: files of its current rollup by relation.
            folder: for the files of a remote run.
        """
        self._info = run.read_json(RUN)
        self._names = names
        self._paths = {relation: run.store.local_copy(name, folder) for relation, name in names.items()}
        self._lock = threading.Lock()
        self._gathered = _Gathered(self._paths[DOCUMENTS])
        self._labels: pa.Table | None = None
        self._rows = 0
        self._wrong: list[str] = []

    def check_shard(self, shard: int, paths: Mapping[str, Path]) -> None:
        """Counts the files of a sound shard and compares; safe to call from several threads at once.

        Args:
            shard: its number.
            paths: local files by table.
        """
        found = self._read(DOCUMENTS, shard)
        if found is None:
            return
        run = warehouse.open_shard(paths, self._info)
        counted = run.connection.sql(f"select {', '.join(found.column_names)} from document_counts").to_arrow_table()
        labels = run.connection.sql(f"select {', '.join(_KEYS[LABELS] + _COUNTS)} from label_counts").to_arrow_table()
        with self._lock:
            self._rows += found.num_rows
            self._labels = _summed([labels] if self._labels is None else [self._labels, labels])
            if not _same(found, counted, _KEYS[DOCUMENTS]):
                self._wrong.append(f"{self._names[DOCUMENTS]} has other counts of shard {shard} than its tables give")

    def finish(self) -> list[str]:
        """Compares the sums over all shards, after every shard was checked.

        Returns:
            The problems of the rollup.
        """
        if self._labels is None or self._wrong:
            return sorted(set(self._wrong))
        if pq.read_metadata(self._paths[DOCUMENTS]).num_rows != self._rows:
            self._wrong.append(f"{self._names[DOCUMENTS]} has rows of shards that are not committed")
        found = self._read(LABELS)
        if found is not None and not _same(found, self._labels, _KEYS[LABELS]):
            self._wrong.append(f"{self._names[LABELS]} has other counts of labels than the tables give")
        return self._wrong

    def _read(self, relation: str, shard: int | None = None) -> pa.Table | None:
        """Returns the rows of a file, or those of one shard of the documents; None if it cannot be read."""
        try:
            schema = columns(pq.read_schema(self._paths[relation]))
            table = pq.read_table(self._paths[relation]) if shard is None else self._gathered.of_shard(shard)
        except (pa.ArrowException, OSError, ValueError) as error:
            self._wrong.append(f"{self._names[relation]} cannot be read: {type(error).__name__}")
            return None
        if schema != columns(SCHEMAS[relation]):
            self._wrong.append(f"{self._names[relation]} has other columns than a rollup has")
            return None
        return table


class _Gathered:
    """Returns the documents of a rollup by shard; keeps the last row groups, because each holds many shards."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._read: dict[tuple[int, ...], pa.Table] = {}

    def of_shard(self, shard: int) -> pa.Table:
        with self._lock, pq.ParquetFile(self._path) as file:
            spans = map(_span, map(file.metadata.row_group, range(file.num_row_groups)))
            groups = tuple(i for i, span in enumerate(spans) if span is not None and span[0] <= shard <= span[1])
            if groups not in self._read:
                self._read = dict(list(self._read.items())[-1:])  # other threads may still need the previous ones
                self._read[groups] = file.read_row_groups(groups)
            table = self._read[groups]
        return table.filter(pc.equal(table["shard"], shard))


def _span(group: pq.RowGroupMetaData) -> tuple[int, int] | None:
    """Returns the first and last shard in a row group; None if it has no row, as in the rollup of no document."""
    if not group.num_rows:
        return None
    shard = next(group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == "shard")
    return shard.statistics.min, shard.statistics.max


def _summed(tables: Sequence[pa.Table]) -> pa.Table:
    keys = _KEYS[LABELS]
    summed = pa.concat_tables(tables).group_by(keys).aggregate([(name, "sum") for name in _COUNTS])
    return summed.rename_columns({f"{name}_sum": name for name in _COUNTS}).select([*keys, *_COUNTS])


def _same(found: pa.Table, expected: pa.Table, keys: Sequence[str]) -> bool:
    """Whether two tables have the same rows in any order, with floats equal up to rounding."""
    if found.num_rows != expected.num_rows:
        return False
    found, expected = _ordered(found, keys), _ordered(expected, keys)
    return all(_same_values(found[name], expected[name]) for name in found.column_names)


def _ordered(table: pa.Table, keys: Sequence[str]) -> pa.Table:
    stack = table.schema.get_field_index("stack")
    return table.set_column(stack, "stack", table["stack"].cast(pa.string())).sort_by([(k, "ascending") for k in keys])


def _same_values(found: pa.ChunkedArray, expected: pa.ChunkedArray) -> bool:
    if pa.types.is_list(found.type):
        same_lengths = pc.list_value_length(found).equals(pc.list_value_length(expected))
        return same_lengths and _same_values(pc.list_flatten(found), pc.list_flatten(expected))
    if pa.types.is_floating(found.type):
        numbers = (found.to_numpy(), expected.to_numpy())
        return bool(np.allclose(*numbers, rtol=_RELATIVE, atol=_RELATIVE, equal_nan=True))  # NaN: null
    return found.equals(expected.cast(found.type))
