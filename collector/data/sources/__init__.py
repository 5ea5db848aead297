"""Finds the sources of documents, reads them, and names each document.

`resolve` turns `--data` into a list of sources (a file each, or a corpus), always in the same order:
as given, and sorted within a glob. `documents` reads a span of one of them. Locations are absolute,
so any worker on any node with the same files reads the same data. `formats` splits files into rows,
and `plan` decides which rows make up a shard.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collector.config import DEMO, DataConfig
from collector.data.corpus import SOURCE, corpus_path
from collector.data.formats import FORMATS, Format, Span
from collector.data.sources import compressed, embedded, files, huggingface, kinds, listing
from collector.data.sources.documents import BadRow, Document, Message, TextSpan, are_utf8, as_document
from collector.data.sources.labels import LABEL_SEPARATOR
from collector.data.sources.meaning import Meaning, is_wide, spread_labels, wide_columns
from collector.data.sources.source import Source

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from typing import BinaryIO

__all__ = [
    "LABEL_SEPARATOR", "BadRow", "Document", "Message", "Source", "Span", "TextSpan", "documents", "fingerprint",
    "is_pinned", "reader", "resolve", "settle", "spread_labels",
]  # fmt: skip

_THREADS = 16
_FORMATS = {**FORMATS, "demo": embedded.Embedded, "saved": huggingface.Saved}


def _find(spec: str) -> list[tuple[str, str | None, dict[str, Any]]]:
    """Returns location, kind (None: to be looked at) and options of every source that a `--data` value denotes."""
    if spec == DEMO or spec.startswith(f"{DEMO}:"):
        return [(f"{DEMO}:{embedded.split_of(spec)}", "demo", {})]
    if huggingface.is_hub_spec(spec):
        return [(location, None, options) for location, options in huggingface.list_split(spec)]
    folder = files.absolute(spec)
    if not files.is_url(folder) and Path(folder).is_dir() and huggingface.is_saved(folder):
        return [(folder, "saved", {})]
    return [(location, None, {}) for location in listing.list_files(spec)]


def resolve(data: DataConfig) -> list[Source]:
    """Returns all sources of a configuration, in reading order; looks at the first bytes of each file.

    Raises:
        ValueError: a specification matches nothing, two of them match the same file, a name is not UTF-8, or a file is
            of a kind that is not read.
    """
    found = [each for spec in data.data for each in _find(spec)]
    for location, *_ in found:
        if not are_utf8([location]):
            raise ValueError(f"--data names {location!r}: its name is not UTF-8, so no id can be made of it; rename it")
    _require_distinct([location for location, *_ in found])
    folders = [location.split("/")[:-1] for location, kind, _ in found if kind != "demo"]
    shared = sum(1 for _ in itertools.takewhile(lambda level: len(set(level)) == 1, zip(*folders, strict=False)))
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found_kinds = list(pool.map(lambda each: each[1] or _kind(each[0]), found))
    return [
        Source(
            location=location, kind=kind, options=options,
            name=SOURCE if kind == "demo" else "/".join(location.split("/")[shared:]),
        )
        for (location, _, options), kind in zip(found, found_kinds, strict=True)
    ]  # fmt: skip


def _require_distinct(locations: list[str]) -> None:
    """Raises if two locations are the same file, by name or through a link."""
    for location, times in collections.Counter(locations).items():
        if times > 1:
            raise ValueError(f"--data names {location} {times} times; give it once")
    location_of: dict[str, str] = {}
    for location in locations:
        real = os.path.realpath(location) if location.startswith("/") else location
        if (other := location_of.setdefault(real, location)) != location:
            raise ValueError(f"--data names one file twice, as {other} and as {location}; give it once")


def _kind(location: str) -> str:
    return kinds.kind_of(location, functools.partial(files.open_file, location))


def is_pinned(spec: str) -> bool:
    """Whether a specification resolves to one commit on the hub, whose files cannot change."""
    return huggingface.is_hub_spec(spec) and not Path(huggingface.parse(spec)[0]).is_dir()


def fingerprint(source: Source) -> str:
    """Returns a string that changes when the content of a source does."""
    if source.kind == "demo":
        return files.fingerprint(str(corpus_path()))
    if source.kind == "saved":
        return huggingface.saved_fingerprint(source.location)
    return files.fingerprint(source.location)


def settle(source: Source, data: DataConfig) -> list[tuple[Source, Format]]:
    """Looks into a source, and returns it with the options that its readers need, and a reader.

    A wide file is returned once per text column.

    Raises:
        ValueError: it has no such text column.
    """
    found = reader(source, data)
    if not source.is_file:
        return [(source, found)]
    wanted = {name for _, name in found.columns.wanted}
    names = {**source.options.get("names", {}), **found.classes()}
    names = {name: classes for name, classes in names.items() if name in wanted}
    settled = dataclasses.replace(source, options={**source.options, "names": names} if names else source.options)
    if not is_wide(data.text_column) or data.text_column in (columns := found.names()):
        return [(settled, found)]
    texts = [
        dataclasses.replace(settled, options={**settled.options, "text": text, "column": column})
        for text, column in wide_columns(data.text_column, columns, source.location).items()
    ]
    return [(text, reader(text, data)) for text in texts]


def reader(source: Source, data: DataConfig, version: str | None = None) -> Format:
    """Returns the format of a source, ready to locate and read its rows.

    Args:
        source: the file, folder or corpus.
        data: names of its columns.
        version: its fingerprint, to keep it open for the next span; None to close it after each.

    Raises:
        ValueError: a target column is requested from a source without columns.
    """
    columns = Meaning.of(source, data).columns
    return _FORMATS[source.format](_opener(source, version), columns, source.location, version, source.options)


def _opener(source: Source, version: str | None) -> Callable[[], BinaryIO]:
    open_file = functools.partial(files.open_file, source.location, scattered=source.format == "parquet")
    if not source.compression:
        return open_file
    return functools.partial(compressed.open_unpacked, open_file, source.location, source.compression, version)


def documents(
    source: Source, data: DataConfig, span: Span, keep: Collection[int] | None = None, *, version: str | None = None
) -> Iterator[tuple[int, Document | BadRow]]:
    """Yields the rows of a span with their numbers, each as a document or as a bad row with its reason.

    Raises:
        DamagedError: the span, or a part of it, cannot be read.
    """
    meaning = Meaning.of(source, data)
    has_target = data.target_column is not None
    for row, fields in reader(source, data, version).read(span, keep):
        yield row, as_document(
            meaning.complete(fields), name=source.name, row=row, label=meaning.label, column=meaning.column,
            has_target=has_target,
        )  # fmt: skip
