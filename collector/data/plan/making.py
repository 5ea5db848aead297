"""Lists the sources and cuts them into shards."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import itertools
import json
from typing import TYPE_CHECKING, TypeVar

from collector.data import sources
from collector.data.plan.frozen import Plan, Shard
from collector.data.sources import BadRow, Document, Source, Span

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from collector.config import DataConfig, RunConfig

_THREADS = 16
_AHEAD = 4 * _THREADS
_LOOKED_AT = 1000

Item = TypeVar("Item")
Result = TypeVar("Result")
Cut = tuple[Span, tuple[int, ...] | None]
"""A span and the numbers of its selected rows; None means all."""


def in_order(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    """Yields each item with the result of `work`, in order, computing several at a time.

    The first item that fails raises its error. At most `_AHEAD` results are computed in advance.
    """
    remaining = iter(items)
    pool = concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="plan")
    try:
        ahead = collections.deque((item, pool.submit(work, item)) for item in itertools.islice(remaining, _AHEAD))
        while ahead:
            item, future = ahead.popleft()
            yield item, future.result()
            ahead.extend((each, pool.submit(work, each)) for each in itertools.islice(remaining, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def make_plan(config: RunConfig, found: list[Source] | None = None) -> Plan:
    """Lists the sources and cuts them into shards.

    Args:
        config: the settings.
        found: the sources, if they have been listed already.

    Raises:
        ValueError: a source or column is missing, or there are no rows at all.
    """
    data = config.data
    cut = _cut_selected if data.per_label is not None or data.limit is not None else _cut_whole
    shards: list[Shard] = []
    fingerprints: dict[str, str | None] = {}
    for source, fingerprint, cuts in cut(sources.resolve(data) if found is None else found, data):
        fingerprints[source.location] = fingerprint
        for number, (span, keep) in enumerate(cuts, len(shards)):
            assert fingerprint is not None, "what was not read has no rows"
            shards.append(_shard(number, source, span, keep, fingerprint))
    if not shards:
        raise ValueError(f"--data {' '.join(data.data)} holds no row at all")
    return Plan(shards=tuple(shards), config=config.to_dict(), sources=fingerprints)


def has_conversations(found: list[Source], data: DataConfig) -> bool:
    """Whether documents are conversations; looks at the first good rows of the first source."""
    first, reader = sources.settle(found[0], data)[0]
    for span in itertools.islice(reader.locate(_LOOKED_AT), 1):
        for _, row in sources.documents(first, data, span) if not span.damaged else ():
            if isinstance(row, Document) or row.reason.startswith("messages"):
                return isinstance(row, BadRow) or bool(row.messages)
    return False


def label_warnings(found: list[Source], data: DataConfig) -> list[str]:
    """Returns a line for each label that the path gives to files in folders that differ."""
    return [
        f"label {label!r} comes from {len(places)} folders ({places[0]}, {places[1]} …): "
        "if each of them has a label of its own, set --label-column @folder"
        for label, places in sources.spread_labels(found, data).items()
    ]


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
        options=json.dumps(source.options, sort_keys=True) if source.options else "",
    )


# -- all rows ----------------------------------------------------------------------------------------


def _cut_whole(found: list[Source], data: DataConfig) -> Iterator[tuple[Source, str | None, Iterator[Cut]]]:
    """Yields the fingerprint and spans of each source."""

    def look(source: Source) -> tuple[str, list[tuple[Source, list[Span]]]]:
        settled = sources.settle(source, data)
        located = [(each, list(reader.locate(data.docs_per_shard))) for each, reader in settled]
        return sources.fingerprint(source), located

    for _, (fingerprint, located) in in_order(look, found):
        for source, spans in located:
            yield source, fingerprint, ((span, None) for span in spans)


# -- a selection of rows -----------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True)
class _Selection:
    """Counts selected documents against `--per-label` and `--limit`."""

    per_label: int | None
    limit: int | None
    taken: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    total: int = 0

    def full(self) -> bool:
        return self.limit is not None and self.total >= self.limit

    def takes(self, row: Document | BadRow) -> bool:
        if isinstance(row, BadRow):
            return True
        if self.per_label is not None and all(self.taken[label] >= self.per_label for label in row.labels):
            return False
        self.taken.update(row.labels)
        self.total += 1
        return True


def _cut_selected(found: list[Source], data: DataConfig) -> Iterator[tuple[Source, str | None, Iterator[Cut]]]:
    """Like `_cut_whole`, but with selected rows; exhaust each source's cuts before advancing to the next source."""
    selection = _Selection(per_label=data.per_label, limit=data.limit)
    for source in found:
        if selection.full():
            yield source, None, iter(())
            continue
        fingerprint = sources.fingerprint(source)
        for each, _ in sources.settle(source, data):
            yield each, fingerprint, _pack(_taken(each, data, fingerprint, selection), data.docs_per_shard)


def _taken(source: Source, data: DataConfig, fingerprint: str, selection: _Selection) -> Iterator[tuple[int, Span]]:
    """Yields the selected rows, each with its span."""
    for span in sources.reader(source, data).locate(data.docs_per_shard):
        if selection.full():
            return
        if span.damaged:
            yield span.first_row, span
            continue
        for row, document in sources.documents(source, data, span, version=fingerprint):
            if selection.full():
                return
            if selection.takes(document):
                yield row, span


def _pack(taken: Iterator[tuple[int, Span]], every: int) -> Iterator[Cut]:
    """Groups selected rows into cuts of `every` rows, damaged spans apart; a cut that keeps all its rows gets None."""
    for _, together in itertools.groupby(taken, lambda pair: pair[1].damaged):
        while batch := list(itertools.islice(together, every)):
            rows, span = tuple(row for row, _ in batch), batch[0][1]
            length = rows[-1] + 1 - span.first_row
            cut = dataclasses.replace(span, rows=length)
            yield cut, None if length == len(rows) else rows
