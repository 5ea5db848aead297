"""Reads formats whose rows are lists of fields: CSV and TSV.

A file starts with a header, unless columns are addressed by position (from 0). All records must
have as many fields as the first one: otherwise a stray separator would silently truncate a text.
CSV is parsed by Python's `csv`, so quoted fields may hold line ends (RFC 4180); TSV has no quoting.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import itertools
from typing import TYPE_CHECKING, Any

from collector.data.formats.base import DamagedError
from collector.data.formats.lines import LineFormat, split_lines, without_end

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import BinaryIO

    from collector.data.formats.base import Span

# Python's default limit, 128 KiB, is too small for a book; without a limit, one stray quote reads a whole file.
_LONGEST_FIELD = 64 << 20


class _Delimited(LineFormat):
    """Base class for rows of fields, named by a header or addressed by position.

    Fields are split as Latin-1, that is byte by byte. Separators are ASCII, so UTF-8 is split at the
    same places, and a field that is not UTF-8 affects only its own row.
    """

    @functools.cached_property
    def _first(self) -> tuple[list[str], int]:
        """The first record, and its length in bytes."""
        with self.open() as file:
            file.seek(self.mark)
            return self._first_record(file)

    def _first_record(self, file: BinaryIO) -> tuple[list[str], int]:
        raise NotImplementedError

    @property
    def start(self) -> int:
        """Byte at which the first row begins, after the header.

        Raises:
            ValueError: a column is missing, or the first record cannot be read.
        """
        # An empty file has no columns to check; any other file is checked before it is scanned.
        length = self._first[1]
        if length:
            self.columns.find(self.names(), self.where)
        return self.mark + (0 if self.columns.positional else length)

    def names(self) -> list[str]:
        """See `Format.names`; numbers from 0 where columns are addressed by position."""
        if self.columns.positional:
            return [str(place) for place in range(len(self._first[0]))]
        return [field.encode("latin-1").decode(errors="replace") for field in self._first[0]]

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        """Position in a record by meaning."""
        names = self.names()
        return {meaning: names.index(name) for meaning, name in self.columns.find(names, self.where).items()}

    def fields(self, record: list[str] | None) -> Mapping[str, Any] | str:
        """See `Format.fields`; None represents a record that cannot be parsed."""
        if record is None:
            return "invalid CSV"
        if not record:
            return "empty line"
        if len(record) != len(self._first[0]):
            return "wrong number of columns"
        try:
            return {meaning: record[place].encode("latin-1").decode() for meaning, place in self._places.items()}
        except UnicodeDecodeError:
            return "invalid UTF-8"


class Tsv(_Delimited):
    """Tab-separated values without quoting, so no field holds a tab or a line end (IANA)."""

    @staticmethod
    def _split(line: bytes) -> list[str]:
        return line.decode("latin-1").split("\t") if line else []

    def _first_record(self, file: BinaryIO) -> tuple[list[str], int]:
        line = next(split_lines(file), b"")
        return self._split(without_end(line)), len(line)

    def records(self, span: Span) -> Iterator[list[str]]:
        """See `Format.records`."""
        return map(self._split, super().records(span))


class _CountedLines:
    """Iterates over lines for `csv.reader` and counts their bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._lines = split_lines(file)
        self.bytes = 0
        self.ended = False
        """Whether a line was requested after the last one."""

    def __iter__(self) -> _CountedLines:
        return self

    def __next__(self) -> str:
        line = next(self._lines, b"")
        if not line:
            self.ended = True
            raise StopIteration
        self.bytes += len(line)
        return line.decode("latin-1")


def _csv_records(lines: _CountedLines, separator: str) -> Iterator[list[str] | None]:
    """Yields the records from here on; an unparsable record becomes None, and parsing resumes at the next line."""
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(lines, delimiter=separator)
    while True:
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error:
            yield None
        else:
            # A record that continues beyond the last line has an unclosed quote.
            yield None if lines.ended else record


class Csv(_Delimited):
    """Comma-separated values, quoted with `"`; the option `sep` is another separator."""

    @property
    def _separator(self) -> str:
        return str(self.options.get("sep", ","))

    def _first_record(self, file: BinaryIO) -> tuple[list[str], int]:
        lines = _CountedLines(file)
        record = next(_csv_records(lines, self._separator), [])
        if record is None:
            raise ValueError(f"{self.where}: the first record is not CSV; close its quotes, end lines with LF or CRLF")
        return record, lines.bytes

    def _cuts(self, every: int) -> Iterator[tuple[int, int]]:
        """See `LineFormat._cuts`; here a row may span several lines."""
        row = cut = 0
        start = end = self.start
        damage = None
        with self.open() as file:
            file.seek(start)
            lines = _CountedLines(file)
            try:
                while self._skip_record(lines):
                    row, end = row + 1, start + lines.bytes
                    if row - cut == every:
                        cut = row
                        yield row, end
            except DamagedError as error:
                damage = error
        if row > cut:
            yield row, end
        if damage is not None:
            raise damage

    def _skip_record(self, lines: _CountedLines) -> bool:
        """Skips one record and returns False at the end. A line without quotes is always a whole record."""
        line = next(lines, None)
        if line is not None and '"' in line:
            with contextlib.suppress(csv.Error):
                next(csv.reader(itertools.chain([line], lines), delimiter=self._separator))
        return line is not None

    def records(self, span: Span) -> Iterator[list[str] | None]:
        """See `Format.records`."""
        with self.open() as file:
            file.seek(span.offset or 0)
            yield from itertools.islice(_csv_records(_CountedLines(file), self._separator), span.rows)
