"""The manifest of a complete run: all its commit records in one Parquet file, `_MANIFEST.parquet`, sorted by shard.

Readers of a finished run open this one file instead of every record; the records stay the truth.

Guarantees: `decode` returns what `encode` was given, floats to the last bit. The same records give the same bytes with
the same version of pyarrow. `_SUCCESS` holds the SHA-256 of the file, and a manifest with another hash is not read.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from collector.store.commits import Commit, DamagedRecordError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MANIFEST = "_MANIFEST.parquet"
_PART = pa.struct({"path": pa.string(), "rows": pa.int64(), "bytes": pa.int64(), "sha256": pa.string()})
_SKIPPED = pa.struct({"count": pa.int64(), "examples": pa.list_(pa.string())})
SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int64(), nullable=False),
        pa.field("attempt", pa.string(), nullable=False),
        pa.field("plan_hash", pa.string(), nullable=False),
        pa.field("files", pa.map_(pa.string(), _PART), nullable=False),
        pa.field("documents", pa.int64(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("characters", pa.int64(), nullable=False),
        pa.field("truncated", pa.int64(), nullable=False),
        pa.field("skipped", pa.map_(pa.string(), _SKIPPED), nullable=False),
        pa.field("batches", pa.int64(), nullable=False),
        pa.field("padded_tokens", pa.int64(), nullable=False),
        pa.field("halved", pa.int64(), nullable=False),
        pa.field("several_labels", pa.int64(), nullable=False),
        pa.field("seconds", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("node", pa.string(), nullable=False),
    ]
)
_ROWS = 1024
_MAPPINGS = ("files", "skipped", "seconds")


def encode(commits: Sequence[Commit]) -> bytes:
    """Encodes records as a manifest."""
    assert SCHEMA.names == [field.name for field in dataclasses.fields(Commit)], "every field has its column"
    rows = [dataclasses.asdict(commit) for commit in commits]
    for row in rows:
        row |= {name: list(row[name].items()) for name in _MAPPINGS}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def decode(data: bytes) -> Iterator[Commit]:
    """Yields the records of a manifest; a thousand of them are in memory at a time.

    Raises:
        DamagedRecordError: the data is no manifest, or has another version.
    """
    try:
        for rows in pq.ParquetFile(pa.BufferReader(data)).iter_batches(_ROWS, use_threads=False):
            for row in rows.to_pylist():
                yield Commit.from_fields(row | {name: dict(row[name]) for name in _MAPPINGS})
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedRecordError(f"{MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
