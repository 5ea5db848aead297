"""Reads formats whose rows are lines: JSON lines and plain text.

Only LF ends a line, and a CR before it is dropped, so a text may hold U+2028 or a lone CR. An empty
line counts as a row and is rejected; there is no further line after the last line end. A UTF-8 byte
order mark at the start of the file is skipped.

Planning scans every byte once for line ends, at several GB per second, so the disk is the limit.
Cutting a file at byte offsets would need no scan, but rows would have no numbers: ids are NAME#ROW,
and a shard knows exactly how many rows it must find.
"""

from __future__ import annotations

import functools
import itertools
import json
from typing import TYPE_CHECKING, Any

from collector.data.formats.base import DamagedError, Format, Span
from collector.data.formats.columns import dig, nested_names

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import BinaryIO

    from collector.data.formats.columns import Columns

_SCAN_BLOCK = 4 << 20
_READ_BLOCK = 1 << 20
_OPENING = 64
# The part of a file in which a required column must occur.
_LOOKED_AT = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Byte order marks of UTF-16 and UTF-32 start with one of these; UTF-8 never does.
_OTHER_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")


def split_lines(file: BinaryIO, block: int = _READ_BLOCK) -> Iterator[bytes]:
    """Yields the lines from the current position, each with its LF; the last line may lack it."""
    pieces: list[bytes] = []
    while data := file.read(block):
        first, *others = data.split(b"\n")
        pieces.append(first)
        for piece in others:
            yield b"".join([*pieces, b"\n"])
            pieces = [piece]
    if line := b"".join(pieces):
        yield line


def without_end(line: bytes) -> bytes:
    """Returns a line without its LF or CR LF."""
    return line.removesuffix(b"\n").removesuffix(b"\r")


class LineFormat(Format):
    """Base class for formats with one row per line."""

    @functools.cached_property
    def opening(self) -> bytes:
        """The first bytes of the file."""
        with self.open() as file:
            return file.read(_OPENING)

    @functools.cached_property
    def mark(self) -> int:
        """Length of the byte order mark in bytes, 0 if there is none.

        Raises:
            ValueError: the byte order mark is that of another encoding.
        """
        if self.opening.startswith(_OTHER_MARKS):
            raise ValueError(f"{self.where} is UTF-16: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)")
        return len(_BYTE_ORDER_MARK) if self.opening.startswith(_BYTE_ORDER_MARK) else 0

    @property
    def start(self) -> int:
        """Byte at which the first row begins."""
        return self.mark

    def locate(self, every: int) -> Iterator[Span]:
        """See `Format.locate`.

        An unreadable rest becomes a span of its own, after the spans of all rows before it.
        """
        first_row = offset = 0
        try:
            offset = self.start
            for row, end in self._cuts(every):
                yield Span(first_row=first_row, rows=row - first_row, offset=offset)
                first_row, offset = row, end
        except DamagedError:
            yield Span(first_row=first_row, rows=1, offset=offset, damaged=True)

    def _cuts(self, every: int) -> Iterator[tuple[int, int]]:
        """Yields row number and byte offset of each `every`-th row, and at the end those just after the last row.

        Scans for line ends only, block by block.

        Raises:
            DamagedError: after the cuts of the readable part.
        """
        import numpy as np

        rows = cut = 0
        base = end = self.start
        damage = None
        with self.open() as file:
            file.seek(base)
            try:
                while block := file.read(_SCAN_BLOCK):
                    ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
                    for place in ends[-(rows + 1) % every :: every].tolist():
                        cut += every
                        yield cut, base + place + 1
                    rows, end = rows + len(ends), base + int(ends[-1]) + 1 if len(ends) else end
                    base += len(block)
            except DamagedError as error:
                damage = error
        if damage is None and base > end:
            rows, end = rows + 1, base
        if rows > cut:
            yield rows, end
        if damage is not None:
            raise damage

    def records(self, span: Span) -> Iterator[Any]:
        """See `Format.records`: lines without their end."""
        with self.open() as file:
            file.seek(span.offset or 0)
            yield from map(without_end, itertools.islice(split_lines(file), span.rows))


class Text(LineFormat):
    """Plain text with one document per line."""

    def fields(self, record: bytes) -> Mapping[str, Any] | str:
        """See `Format.fields`."""
        try:
            return {"text": record.decode()}
        except UnicodeDecodeError:
            return "invalid UTF-8"


class JsonLines(LineFormat):
    """JSON lines with one object per line."""

    def locate(self, every: int) -> Iterator[Span]:
        """See `LineFormat.locate`.

        Raises:
            ValueError: none of the first rows has a required column.
        """
        required = {name for meaning, name in self.columns.wanted if meaning in self.columns.required}
        for row in self._first_rows():
            required -= {name for name in required if dig(row, name)[1]}
            if not required:
                break
        else:  # names what there is, unless there is no row to go by
            if names := self.names():
                self.columns.find(names, self.where)
        return super().locate(every)

    def _first_rows(self) -> Iterator[dict[str, Any]]:
        """Yields the rows in the part of the file where a required column must occur."""
        try:
            with self.open() as file:
                file.seek(self.start)
                block = file.read(_LOOKED_AT)
        except DamagedError:  # reported where the rows are located
            return
        lines = block.split(b"\n")
        # The last line may be cut, unless it is the only one.
        for row in map(_parse, lines[:-1] or lines):
            if isinstance(row, dict):
                yield row

    def names(self) -> list[str]:
        """See `Format.names`."""
        return list(dict.fromkeys(itertools.chain.from_iterable(map(nested_names, self._first_rows()))))

    def fields(self, record: bytes) -> Mapping[str, Any] | str:
        """See `Format.fields`."""
        if not record.strip():
            return "empty line"
        row = _parse(record)
        return row if isinstance(row, str) else wanted_of(row, self.columns)


def wanted_of(row: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    """Returns the wanted columns that a row of nested values has, by meaning."""
    found = {meaning: row[name] for meaning, name in columns.wanted if name in row}
    for meaning, name in columns.paths:
        if meaning not in found:
            value, is_there = dig(row, name)
            found |= {meaning: value} if is_there else {}
    return found


def _parse(line: bytes) -> dict[str, Any] | str:
    """Returns the object of a line, or one of `REASONS`."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        return "invalid UTF-8"
    except (ValueError, RecursionError):
        return "invalid JSON"
    return row if isinstance(row, dict) else "not an object"
