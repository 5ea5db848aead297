"""Defines what all formats share: spans of rows, and the base class `Format`.

To add a format, subclass `Format`, implement `locate`, `records` and `fields`, and enter the class
in `FORMATS` of this package. Finding and opening files is done elsewhere.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from collector.data.formats.columns import Columns

BEYOND_VOCABULARY = "token beyond the model's vocabulary"
PROMPT_TOO_LONG = "conversation to be answered is longer than --max-length"
REASONS = (
    "empty line",
    "invalid UTF-8",
    "invalid JSON",
    "not an object",
    "invalid CSV",
    "wrong number of columns",
    "no text",
    "text is not a string",
    "empty text",
    "no label",
    "label is not a string or number",
    "label too long",
    "label contains ␟",
    "no target",
    "target is not a string",
    "empty target",
    "spans are not a list of start, end and label",
    "span outside the text",
    "messages without role and content",
    "token ids out of range",
    "conversation without a turn to answer",
    "chat template does not take the messages",
    BEYOND_VOCABULARY,
    PROMPT_TOO_LONG,
)
"""All reasons for which a row is rejected as a document."""


class DamagedError(ValueError):
    """A file cannot be read beyond this point; everything before it can."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Consecutive rows of one file."""

    first_row: int
    rows: int
    offset: int | None = None
    """Byte at which `first_row` begins (in the decompressed file); None if the format does not need it."""
    damaged: bool = False
    """Whether the file is unreadable here; the span's single row then represents everything from `first_row` on."""


class Format:
    """One file of one format. Subclasses find where rows begin, and turn a raw row into columns."""

    def __init__(
        self, open_file: Callable[[], BinaryIO], columns: Columns, where: str, version: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Prepares reading without opening the file.

        Args:
            open_file: opens the file at its start.
            columns: names of the wanted columns.
            where: location of the file, for messages.
            version: fingerprint of the content, under which the file may stay open from one span to the next; None to
                close it after each span.
            options: how to read it, beyond its kind: `sep` of CSV, `field` of a JSON document.
        """
        self.options = options or {}
        self.open = open_file
        self.columns = columns
        self.where = where
        self.version = version

    def locate(self, every: int) -> Iterator[Span]:
        """Cuts the file into spans of `every` rows; the last one may be shorter."""
        raise NotImplementedError

    def names(self) -> list[str]:
        """Returns the names of the columns, those inside nested values as dotted paths.

        Of JSON they are those of the first rows. A format without columns has none.
        """
        return []

    def classes(self) -> Mapping[str, Sequence[str]]:
        """Returns the names of the classes by column, where the file stores their numbers (`datasets.ClassLabel`)."""
        return {}

    def records(self, span: Span) -> Iterator[Any]:
        """Yields the raw rows of a span."""
        raise NotImplementedError

    def fields(self, record: Any) -> Mapping[str, Any] | str:
        """Returns the wanted columns that a raw row has, by meaning, or one of `REASONS` if it is unusable."""
        raise NotImplementedError

    def read(self, span: Span, keep: Collection[int] | None) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
        """Yields row number and `fields` for the rows of a span, or only for those in `keep`."""
        for row, record in enumerate(self.records(span), span.first_row):
            if keep is None or row in keep:
                yield row, self.fields(record)


def even_spans(rows: int, every: int) -> Iterator[Span]:
    """Cuts a source with random access to rows into spans of `every` rows."""
    for first_row in range(0, rows, every):
        yield Span(first_row=first_row, rows=min(every, rows - first_row))
