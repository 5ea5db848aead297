"""Formats whose row is a line: JSON lines and plain text.

A line is ended by LF, and a CR before it is dropped; nothing else ends a line, so a text may hold
U+2028 or a lone CR. An empty line is a row, and a bad one; after the last line end there is no
further line. A UTF-8 byte order mark at the start of the file is skipped.

Planning looks at every byte once, for line ends alone: several GB a second, so that the disk decides.
Cutting a file by bytes without looking would be free, but a row would have no number: ids are NAME#ROW,
and a shard knows exactly how many rows it must find.
"""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from collector.data.formats.base import DamagedError, Format, Span

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import BinaryIO

_SCAN_BLOCK = 4 << 20
_READ_BLOCK = 1 << 20
_OPENING = 64
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Of UTF-16, and with one of them begin those of UTF-32; no UTF-8 begins so.
_OTHER_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")


def split_lines(file: BinaryIO, block: int = _READ_BLOCK) -> Iterator[bytes]:
    """The lines of a file from where it stands, each with its LF except an unended last one."""
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
    """A line without its LF or CR LF."""
    return line.removesuffix(b"\n").removesuffix(b"\r")


class LineFormat(Format):
    """A row is a line."""

    @functools.cached_property
    def opening(self) -> bytes:
        """The first bytes of the file."""
        with self.open() as file:
            return file.read(_OPENING)

    @functools.cached_property
    def mark(self) -> int:
        """Bytes of the byte order mark.

        Raises:
            ValueError: it is that of another encoding.
        """
        if self.opening.startswith(_OTHER_MARKS):
            raise ValueError(f"{self.where} is UTF-16: write it anew in UTF-8 (iconv -f UTF-16 -t UTF-8)")
        return len(_BYTE_ORDER_MARK) if self.opening.startswith(_BYTE_ORDER_MARK) else 0

    @property
    def start(self) -> int:
        """Byte at which the first row begins."""
        return self.mark

    def locate(self, every: int) -> Iterator[Span]:
        """See `Format.locate`.

        What cannot be read is a span of its own, behind all rows before it.
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
        """Number and byte of each `every`-th row, and what would be those of the row behind the last.

        Looks for line ends only, block by block.

        Raises:
            DamagedError: after the cuts of all that can be read.
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
    """Plain text: a line is a document."""

    def fields(self, record: bytes) -> Mapping[str, Any] | str:
        """See `Format.fields`."""
        try:
            return {"text": record.decode()}
        except UnicodeDecodeError:
            return "invalid UTF-8"


class JsonLines(LineFormat):
    """A line is a JSON object."""

    @functools.cached_property
    def _wanted(self) -> tuple[tuple[str, str], ...]:
        """Meaning and name of the columns that may be there."""
        return tuple(self.columns.wanted().items())

    @property
    def start(self) -> int:
        """Byte at which the first row begins.

        Raises:
            ValueError: a `.json` file is one array rather than lines.
        """
        may_be_array = ".json" in PurePosixPath(self.where.lower()).suffixes
        if may_be_array and self.opening[self.mark :].lstrip().startswith(b"["):
            raise ValueError(f"{self.where} is one JSON array: write an object per line instead (jq -c '.[]')")
        return self.mark

    def fields(self, record: bytes) -> Mapping[str, Any] | str:
        """See `Format.fields`."""
        if not record.strip():
            return "empty line"
        try:
            row = json.loads(record.decode())
        except UnicodeDecodeError:
            return "invalid UTF-8"
        except (ValueError, RecursionError):
            return "invalid JSON"
        if not isinstance(row, dict):
            return "not an object"
        return {meaning: row[name] for meaning, name in self._wanted if name in row}
