"""The frozen plan of a run: which rows of which source make which shard.

Making it scans text files once for where rows begin, and of Parquet reads the footer; with
`--per-label` or `--limit` it also reads the rows, through the same readers as the workers do.
No text enters the plan.

Guarantees: the same sources and settings give the same plan, whose hash covers every setting,
source and row number. Every row lies in exactly one shard (with a selection: every row taken), and
a bad row like any other, so that the shard which meets it reports it. A shard lies in one source
and is read from there alone; a source that changed since is refused.

`--limit` and `--per-label` count good documents. Bad rows in between are taken as well and cost
nothing of either; once the limit is full, reading stops. What becomes of the documents is not known
here.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import io
import json
from typing import TYPE_CHECKING, Any

from collector import sources
from collector.sources import BadRow, Document, Source, Span

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from collector.config import DataConfig, RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """The unit of work: consecutive rows of one source."""

    shard: int
    """Its number, from 0."""
    source: str
    """Absolute path, URL, or `demo:SPLIT`."""
    name: str
    """The source's part of a document's default id."""
    kind: str
    """How the source is read."""
    first_row: int
    """From here the source is read; with `keep`, up to a shard's length before the first row kept."""
    rows: int
    """Rows of the source that are passed over or taken."""
    offset: int | None
    """Byte where `first_row` begins, for text formats."""
    keep: tuple[int, ...] | None
    """The rows taken; None: all."""
    fingerprint: str

    @property
    def planned(self) -> int:
        """Rows taken, each of which becomes a document or is reported as bad."""
        return self.rows if self.keep is None else len(self.keep)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """All shards of a run, and what they were made of."""

    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    """The settings, as `RunConfig.to_dict` gives them."""
    sources: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    """Location -> fingerprint, in reading order; None for a source that a limit left unread."""

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256, in hex, of settings, sources and shards."""
        digest = hashlib.sha256(_canonical([self.config, list(self.sources.items())]))
        for shard in self.shards:
            digest.update(b"\n" + _canonical(list(_row(shard).values())))
        return digest.hexdigest()

    @property
    def documents(self) -> int:
        """Rows taken in all."""
        return sum(shard.planned for shard in self.shards)

    def to_parquet(self) -> bytes:
        """One file: a row per shard; settings, sources and hash in its metadata."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        metadata = {"config": json.dumps(self.config), "sources": json.dumps(self.sources), "hash": self.hash}
        table = pa.Table.from_pylist([_row(shard) for shard in self.shards], schema=_schema().with_metadata(metadata))
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        return buffer.getvalue()

    @classmethod
    def from_parquet(cls, data: bytes) -> Plan:
        """Reads what `to_parquet` wrote.

        Raises:
            ValueError: the content does not have the hash that the file claims.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        # Not read_table: its scanner's threads may outlive the interpreter and then abort the process.
        table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
        metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        if not {"config", "sources", "hash"} <= metadata.keys():
            raise ValueError("this Parquet file is no plan: its metadata has no config, sources and hash")
        rows = [row | {"keep": row["keep"] and tuple(row["keep"])} for row in table.to_pylist()]
        plan = cls(
            shards=tuple(Shard(**row) for row in rows),
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
        ]
    )


def _row(shard: Shard) -> dict[str, Any]:
    return {field.name: getattr(shard, field.name) for field in dataclasses.fields(Shard)}


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


@dataclasses.dataclass(kw_only=True)
class _Selection:
    """What `--per-label` and `--limit` still let through."""

    per_label: int | None
    limit: int | None
    taken: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    @property
    def full(self) -> bool:
        return self.limit is not None and self.taken.total() >= self.limit

    def takes(self, row: Document | BadRow) -> bool:
        if isinstance(row, BadRow):
            return True
        if self.per_label is not None and self.taken[row.label] >= self.per_label:
            return False
        self.taken[row.label] += 1
        return True


def _selected(
    source: Source, data: DataConfig, spans: Iterator[Span], selection: _Selection
) -> Iterator[tuple[int, Span]]:
    """The rows taken, each with the span that it lies in."""
    for span in spans:
        for row, document in sources.documents(source, data, span):
            if selection.full:
                return
            if selection.takes(document):
                yield row, span


def _pack(taken: Iterator[tuple[int, Span]], every: int) -> Iterator[tuple[Span, tuple[int, ...] | None]]:
    """Cuts the rows taken into lists of `every`; None where a list is all that its span holds."""
    while batch := [pair for _, pair in zip(range(every), taken, strict=False)]:
        rows, span = tuple(row for row, _ in batch), batch[0][1]
        length = rows[-1] + 1 - span.first_row
        cut = dataclasses.replace(span, rows=length)
        yield cut, None if length == len(rows) else rows


def make_plan(config: RunConfig) -> Plan:
    """Lists the sources and cuts them into shards.

    Raises:
        ValueError: a source or column is missing, or there is not one document.
    """
    data = config.data
    selection = _Selection(per_label=data.per_label, limit=data.limit)
    selecting = data.per_label is not None or data.limit is not None
    shards: list[Shard] = []
    fingerprints: dict[str, str | None] = {}
    for source in sources.resolve(data):
        if selection.full:
            fingerprints[source.location] = None
            continue
        fingerprint = fingerprints[source.location] = sources.fingerprint(source)
        spans = sources.reader(source, data).locate(data.docs_per_shard)
        taken = _selected(source, data, spans, selection)
        for span, keep in _pack(taken, data.docs_per_shard) if selecting else ((span, None) for span in spans):
            shards.append(_shard(len(shards), source, span, keep, fingerprint))
    if not shards:
        raise ValueError(f"--data {' '.join(data.data)} holds no row at all")
    return Plan(shards=tuple(shards), config=config.to_dict(), sources=fingerprints)


def _shard(number: int, source: Source, span: Span, keep: tuple[int, ...] | None, fingerprint: str) -> Shard:
    return Shard(
        shard=number,
        source=source.location,
        name=source.name,
        kind=source.kind,
        first_row=span.first_row,
        rows=span.rows,
        offset=span.offset,
        keep=keep,
        fingerprint=fingerprint,
    )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two sets of settings, in words for whoever has to decide."""
    keys = [*old, *(key for key in new if key not in old)]
    pairs = [(f"--{key.replace('_', '-')}", _spoken(old.get(key)), _spoken(new.get(key))) for key in keys]
    return [f"{flag} was {was}, is now {now}" for flag, was, now in pairs if was != now]


def _spoken(value: Any) -> str:
    if value is None or value in ((), []):
        return "not given"
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def check_sources(plan: Plan, config: RunConfig) -> list[str]:
    """What has happened to the sources since the plan was made, in words; reads no more than their ends.

    A dataset of the hub is left out: its plan names one commit, which stays readable.
    """
    files = tuple(spec for spec in config.data.data if not sources.is_pinned(spec))
    try:
        found = sources.resolve(dataclasses.replace(config.data, data=files)) if files else []
    except ValueError as error:
        return [str(error)]
    now = {source.location: source for source in found}
    removed = [location for location in plan.sources if location not in now and not location.startswith("hf://")]
    changed = [
        location
        for location, source in now.items()
        if (planned := plan.sources.get(location)) is not None and planned != sources.fingerprint(source)
    ]
    return [
        *(f"{location} is gone" for location in removed),
        *(f"{location} has been added" for location in now if location not in plan.sources),
        *(f"{location} has changed" for location in changed),
    ]


def _require_unchanged(source: Source, planned: str) -> None:
    """Checked for every shard: a file can change while a run reads it."""
    now = sources.fingerprint(source)
    if now != planned:
        raise ValueError(
            f"source changed since the plan was made: {source.location} was {planned}, is {now}; "
            f"restore it, or start a new run"
        )


def read_shard(shard: Shard, data: DataConfig) -> Iterator[Document | BadRow]:
    """The rows of a shard in the order of the source, each as a document or as what is wrong with it.

    Raises:
        ValueError: the source is not what the plan was made of.
    """
    source = Source(location=shard.source, name=shard.name, kind=shard.kind)
    _require_unchanged(source, shard.fingerprint)
    span = Span(first_row=shard.first_row, rows=shard.rows, offset=shard.offset)
    count = 0
    for _, document in sources.documents(source, data, span, None if shard.keep is None else frozenset(shard.keep)):
        count += 1
        yield document
    if count != shard.planned:
        raise ValueError(
            f"source changed since the plan was made: {shard.source} has {count} of the {shard.planned} rows "
            f"of shard {shard.shard}; restore it, or start a new run"
        )
