"""Reads tables row group by row group for the checks, and counts what is wrong.

Memory holds one row group at a time, plus some 30 bytes per token of the shard and one byte per token and router.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from collector.capture.recorders import table_schemas
from collector.store import tables

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Generator, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from collector.store.run_directory import Commit
    from collector.store.tables import Layer

    Problems = Generator[str, None, None]
    """Yields one line per problem."""

STACKS = ("encoder", "decoder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """The facts of run.json with which the tables must agree."""

    layers: tuple[Layer, ...]
    """The recorded routers."""
    schemas: Mapping[str, pa.Schema]
    """Schema by table."""
    drops_token_ids: bool
    lacks: tuple[str, ...] = ()
    """What the source of an imported run did not have; null in its tables."""
    is_imported: bool = False
    """Whether tokens may be missing between others, because an engine lost their routing."""

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> Card:
        """Takes the facts from the content of run.json.

        Raises:
            KeyError, TypeError: run.json was not written by a replica.
        """
        drops_token_ids = info["config"].get("token_ids") == "drop"
        return cls(
            layers=tables.recorded_layers(info), schemas=table_schemas(info), drops_token_ids=drops_token_ids,
            lacks=tables.lacking(info), is_imported="imported" in info,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Documents:
    """Columns of a shard's documents: arrays of shape [D], indexed by `doc`."""

    tokens: NDArray[np.int64]
    target_tokens: NDArray[np.int64] | None
    """None if the model did not run an encoder and a decoder."""
    label: NDArray[np.int64]
    """Number of the label in `labels`."""
    labels: Mapping[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """Columns of a shard's tokens: arrays of shape [T], indexed by `tok`."""

    stack: NDArray[np.uint8]
    """Index into `STACKS`."""
    doc: NDArray[np.int64]
    is_special: NDArray[np.bool_]


def columns(schema: pa.Schema) -> list[tuple[str, str]]:
    """Returns names and types of the columns, in order."""
    return [(field.name, str(field.type).replace("element:", "item:")) for field in schema]


def groups(path: Path, table: str, commit: Commit, schema: pa.Schema, wrong: Counter[str]) -> Iterator[pa.Table]:
    """Yields a file's row groups, up to one with forbidden nulls; counts such nulls and rows of other shards."""
    required = [field.name for field in schema if not field.nullable]
    with pq.ParquetFile(path) as file:
        for index in range(file.num_row_groups):
            group = file.read_row_group(index, use_threads=False)
            for name in required:
                wrong[f"{table}.{name} is null"] += group[name].null_count
            wrong[f"{table}.shard is another shard's"] += int((numbers(group["shard"]) != commit.shard).sum())
            if any(group[name].null_count for name in required):
                return
            yield group


def numbers(column: pa.ChunkedArray) -> NDArray[Any]:
    """Returns a column without its nulls, as an array."""
    return column.drop_null().to_numpy()


def codes(column: pa.ChunkedArray, known: Mapping[str, int]) -> NDArray[np.int64]:
    """Returns the number of each name, of shape [N]; -1 for an unknown name or a null."""
    codes = []
    for chunk in column.chunks:
        names = np.array([known.get(name, -1) for name in chunk.dictionary.to_pylist()] + [-1], np.int64)
        codes.append(names[chunk.indices.fill_null(len(names) - 1).to_numpy(zero_copy_only=False)])
    return np.concatenate(codes) if codes else np.zeros(0, np.int64)


def told(wrong: Counter[str]) -> Problems:
    """Yields one line per kind of mistake."""
    yield from (f"{what} in {count:,} rows" for what, count in wrong.items() if count)


def each_once(counts: NDArray[Any], what: str) -> Problems:
    """Yields a line if some numbers never occurred, and one if some occurred more than once."""
    if (missing := np.flatnonzero(counts == 0)).size:
        yield f"{what} {missing[0]} is missing, with {missing.size - 1:,} others"
    if (repeated := np.flatnonzero(counts > 1)).size:
        yield f"{what} {repeated[0]} occurs more than once, with {repeated.size - 1:,} others"
