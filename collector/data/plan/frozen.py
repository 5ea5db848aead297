"""Defines shards and the immutable plan of a run, with its hash and its Parquet file.

A shard takes some 200 bytes in memory and a few on disk, which keeps plans of a million shards small:
shards share their strings, and the file is written and read by column, in pieces.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import operator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

_PIECE = 1 << 16
_STRINGS = ("source", "name", "kind", "fingerprint", "options")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """The unit of work: consecutive rows of one source."""

    shard: int
    """Number of the shard, from 0."""
    source: str
    """Absolute path, URL, or `demo:SPLIT`."""
    name: str
    """The source's part of a document's default id."""
    kind: str
    """Format and compression of the source, see `Source.kind`."""
    first_row: int
    """Row at which reading starts; with `keep`, up to a shard's length before the first selected row."""
    rows: int
    """Number of rows read from the source, selected or not."""
    offset: int | None
    """Byte where `first_row` begins, for text formats; in the decompressed text if the file is compressed."""
    keep: tuple[int, ...] | None
    """Numbers of the selected rows; None means all."""
    fingerprint: str
    options: str = ""
    """The source's options, see `Source.options`, as JSON; empty if there are none."""

    @property
    def planned(self) -> int:
        """Number of selected rows, each of which becomes a document or is reported as bad."""
        return self.rows if self.keep is None else len(self.keep)


_FIELDS = tuple(field.name for field in dataclasses.fields(Shard))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """All shards of a run, with the settings and sources from which they were made."""

    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    """The settings, as `RunConfig.to_dict` gives them."""
    sources: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    """Fingerprint by location, in reading order; None for a source that was not read because of a limit."""

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of settings, sources and shards, in hex."""
        digest = hashlib.sha256(_canonical([self.config, list(self.sources.items())]))
        lines = _canonical_lines(self.shards)
        while piece := "".join(itertools.islice(lines, _PIECE)):
            digest.update(piece.encode())
        return digest.hexdigest()

    @functools.cached_property
    def documents(self) -> int:
        """Total number of selected rows."""
        return sum(shard.planned for shard in self.shards)

    def to_parquet(self) -> bytes:
        """Encodes the plan as one file: a row per shard, with settings, sources and hash in the metadata."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        metadata = {"config": json.dumps(self.config), "sources": json.dumps(self.sources), "hash": self.hash}
        schema = _schema().with_metadata(metadata)
        buffer = io.BytesIO()
        with pq.ParquetWriter(buffer, schema, compression="zstd") as writer:
            for first in range(0, len(self.shards), _PIECE):
                piece = self.shards[first : first + _PIECE]
                columns = [pa.array(map(operator.attrgetter(f.name), piece), f.type, size=len(piece)) for f in schema]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
        return buffer.getvalue()

    @classmethod
    def from_parquet(cls, data: bytes) -> Plan:
        """Decodes a plan written by `to_parquet`.

        Raises:
            ValueError: the content does not match the hash in the file.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        # read_table is avoided: its scanner's threads may outlive the interpreter and then abort the process.
        file = pq.ParquetFile(pa.BufferReader(data), read_dictionary=list(_STRINGS))
        metadata = {key.decode(): value.decode() for key, value in (file.schema_arrow.metadata or {}).items()}
        if not {"config", "sources", "hash"} <= metadata.keys():
            raise ValueError("this Parquet file is no plan: its metadata has no config, sources and hash")
        pieces = (file.read_row_group(group, use_threads=False) for group in range(file.num_row_groups))
        plan = cls(
            shards=tuple(itertools.chain.from_iterable(map(_shards, pieces))),
            config=json.loads(metadata["config"]),
            sources=json.loads(metadata["sources"]),
        )
        if plan.hash != metadata["hash"]:
            raise ValueError(f"the plan is damaged: its hash is {plan.hash}, the file says {metadata['hash']}")
        return plan


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("shard", pa.uint32(), nullable=False),
            pa.field("source", pa.string(), nullable=False),
            pa.field("name", pa.string(), nullable=False),
            pa.field("kind", pa.string(), nullable=False),
            pa.field("first_row", pa.uint64(), nullable=False),
            pa.field("rows", pa.uint64(), nullable=False),
            pa.field("offset", pa.uint64()),
            pa.field("keep", pa.list_(pa.uint64())),
            pa.field("fingerprint", pa.string(), nullable=False),
            pa.field("options", pa.string(), nullable=False),
        ]
    )


def _shards(table: Any) -> Iterator[Shard]:
    """Yields the shards in a piece of the file."""
    columns = [_keeps(table[name]) if name == "keep" else _values(table[name]) for name in _FIELDS[:-1]]
    # Plans of earlier versions have no options.
    options = _values(table["options"]) if "options" in table.column_names else itertools.repeat("", len(table))
    for shard, source, name, kind, first_row, rows, offset, keep, fingerprint, told in zip(
        *columns, options, strict=True
    ):
        yield Shard(
            shard=shard,
            source=source,
            name=name,
            kind=kind,
            first_row=first_row,
            rows=rows,
            offset=offset,
            keep=keep,
            fingerprint=fingerprint,
            options=told,
        )


def _values(column: Any) -> Sequence[Any]:
    """Returns a column's values; equal strings share one object."""
    import pyarrow as pa

    if not pa.types.is_dictionary(column.type):
        values: list[Any] = column.to_pylist()
        return values
    shared = column.unify_dictionaries().combine_chunks()
    strings = shared.dictionary.to_pylist()
    return [strings[place] for place in shared.indices.to_numpy().tolist()]


def _keeps(column: Any) -> Iterable[tuple[int, ...] | None]:
    if column.null_count == len(column):
        return itertools.repeat(None, len(column))
    return [None if rows is None else tuple(rows) for rows in column.to_pylist()]


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _canonical_lines(shards: Iterable[Shard]) -> Iterator[str]:
    """Yields a line end and `_canonical` of the fields, for each shard; strings that shards share are encoded once."""
    spell = functools.lru_cache(maxsize=64)(json.dumps)
    for s in shards:
        strings = (spell(s.source), spell(s.name), spell(s.kind), spell(s.fingerprint))
        offset = "null" if s.offset is None else s.offset
        keep = "null" if s.keep is None else f"[{','.join(map(str, s.keep))}]"
        options = f",{spell(s.options)}" if s.options else ""
        yield f"\n[{s.shard},{','.join(strings[:3])},{s.first_row},{s.rows},{offset},{keep},{strings[3]}{options}]"
