"""What every format has in common: spans of rows, names of columns, and the base class.

A new format is a subclass of `Format` with `locate`, `records` and `fields`, and a line in the
table of this package. Where files are and how they are opened is not known here.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

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
    "no target",
    "target is not a string",
    "empty target",
)
"""Why a row can fail to be a document: all there are."""


class DamagedError(ValueError):
    """From here on a file cannot be read, while all that lies before can."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Consecutive rows of one file."""

    first_row: int
    rows: int
    offset: int | None = None
    """Byte at which `first_row` begins (of the unpacked file, if it is compressed); None where a format needs none."""
    damaged: bool = False
    """Whether the file cannot be read here: one row, which stands for all that is lost from `first_row` on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """What the wanted columns are called in the source."""

    text: str
    label: str | None
    """None if the label is not in the rows."""
    id: str
    target: str | None = None
    """None if documents have no second text."""

    @property
    def positional(self) -> bool:
        """Whether a CSV or TSV file is addressed by position, and so has no header."""
        return self.text.isdecimal()

    def wanted(self) -> dict[str, str]:
        """Meaning -> name in the source, of all that may be there."""
        named = {
            "text": self.text,
            "label": self.label,
            "id": self.id,
            "target": self.target,
            "parallel_id": "parallel_id",
            "source": "source",
        }
        return {meaning: name for meaning, name in named.items() if name is not None}

    def find(self, names: Sequence[str], where: str) -> dict[str, str]:
        """Meaning -> name, of what is there.

        Raises:
            ValueError: a column that a document cannot do without, or that was asked for, is missing; or a column is
                there several times.
        """
        found = {meaning: name for meaning, name in self.wanted().items() if name in names}
        required = ["text", "label", "target"] if self.id == "id" else ["text", "label", "id", "target"]
        for meaning in required:
            name = self.wanted().get(meaning, "")
            if name and meaning not in found:
                remedy = f"--{meaning}-column" + (", or @file" if meaning == "label" else "")
                raise ValueError(f"{where} has no column {name!r}; it has {', '.join(names) or 'none'}: set {remedy}")
        for name in found.values():
            if (times := list(names).count(name)) > 1:
                raise ValueError(f"{where} has {times} columns {name!r}: rename all but one")
        return found


class Format:
    """One file of one format. Subclasses say where rows begin, and turn a raw row into columns."""

    def __init__(
        self, open_file: Callable[[], BinaryIO], columns: Columns, where: str, version: str | None = None
    ) -> None:
        """Opens nothing yet.

        Args:
            open_file: opens the file at its start.
            columns: what the wanted columns are called.
            where: location of the file, for messages.
            version: fingerprint of the content, under which a file may stay open from one span to the next; None if it
                is read once.
        """
        self.open = open_file
        self.columns = columns
        self.where = where
        self.version = version

    def locate(self, every: int) -> Iterator[Span]:
        """Cuts the file into spans of `every` rows, the last one of what is left."""
        raise NotImplementedError

    def records(self, span: Span) -> Iterator[Any]:
        """The raw rows of a span."""
        raise NotImplementedError

    def fields(self, record: Any) -> Mapping[str, Any] | str:
        """The wanted columns of a raw row by meaning (those that are there), or why it has none."""
        raise NotImplementedError

    def read(self, span: Span, keep: Collection[int] | None) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
        """Row number and `fields` of the rows of a span, or of those in `keep`."""
        for row, record in enumerate(self.records(span), span.first_row):
            if keep is None or row in keep:
                yield row, self.fields(record)


def even_spans(rows: int, every: int) -> Iterator[Span]:
    """Cuts a source that can be entered at any row."""
    for first_row in range(0, rows, every):
        yield Span(first_row=first_row, rows=min(every, rows - first_row))
