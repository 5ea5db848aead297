"""Formats whose row is a line: JSON lines and plain text.

A line is ended by LF, and a CR before it is dropped; nothing else ends a line, so a text may hold
U+2028 or a lone CR. An empty line is a row, and a bad one; after the last line end there is no
further line. A UTF-8 byte order mark at the start of the file is skipped.
"""

from __future__ import annotations

import functools
import itertools
import json
from typing import TYPE_CHECKING, Any

from collector.formats.base import Format, Span

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import BinaryIO

_SCAN_BLOCK = 4 << 20
_READ_BLOCK = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


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
    def mark(self) -> int:
        """Bytes of the byte order mark."""
        with self.open() as file:
            return len(_BYTE_ORDER_MARK) if file.read(3) == _BYTE_ORDER_MARK else 0

    @property
    def start(self) -> int:
        """Byte at which the first row begins."""
        return self.mark

    def locate(self, every: int) -> Iterator[Span]:
        """See `Format.locate`; looks for line ends only, block by block."""
        import numpy as np

        first_row, offset, lines, base, unended = 0, self.start, 0, self.start, False
        with self.open() as file:
            file.seek(base)
            while block := file.read(_SCAN_BLOCK):
                ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
                for end in ends[-(lines + 1) % every :: every].tolist():
                    yield Span(first_row=first_row, rows=every, offset=offset)
                    first_row, offset = first_row + every, base + end + 1
                lines, base, unended = lines + len(ends), base + len(block), block[-1] != ord("\n")
        if lines + unended > first_row:
            yield Span(first_row=first_row, rows=lines + unended - first_row, offset=offset)

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

    def locate(self, every: int) -> Iterator[Span]:
        """See `Format.locate`.

        Raises:
            ValueError: a `.json` file is one array rather than lines.
        """
        if self.where.lower().endswith(".json"):
            with self.open() as file:
                opening = file.read(64).removeprefix(_BYTE_ORDER_MARK).lstrip()
            if opening.startswith(b"["):
                raise ValueError(f"{self.where} is one JSON array: write an object per line instead (jq -c '.[]')")
        return super().locate(every)

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
        return {meaning: row[name] for meaning, name in self.columns.wanted().items() if name in row}
