"""Reads files that are one JSON value: an array of objects, an object that wraps one, or a single object.

    [{"text": …}, {"text": …}]      {"version": 1, "data": [{"text": …}, …]}

Elements are parsed one after the other, so memory holds the longest of them and a block of the file. Planning parses
the file once and notes at which byte every N-th element begins; reading starts there.
"""

from __future__ import annotations

import codecs
import functools
import itertools
import json
from typing import TYPE_CHECKING, Any

from collector.data.formats.base import DamagedError, Format, Span
from collector.data.formats.columns import nested_names
from collector.data.formats.lines import wanted_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import BinaryIO

_BLOCK = 1 << 20
_LONGEST = 256 << 20
"""Characters of an element, beyond which the file is taken for broken."""
_LOOKED_AT = 1000
_DECODER = json.JSONDecoder()


class _Text:
    """A text that is read as far as it is needed; knows at which byte it stands."""

    def __init__(self, file: BinaryIO, offset: int, where: str) -> None:
        file.seek(offset)
        self._file, self._where = file, where
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text, self._place, self._begin, self._ended = "", 0, offset, False

    @property
    def offset(self) -> int:
        """The byte at which the next character stands."""
        return self._begin + _bytes(self._text[: self._place])

    def peek(self) -> str:
        """Returns the next character that is no space, empty at the end."""
        while True:
            rest = self._text[self._place :]
            if stripped := rest.lstrip("\ufeff \t\r\n"):
                self._place += len(rest) - len(stripped)
                return stripped[0]
            self._place = len(self._text)
            if not self._more():
                return ""

    def take(self, expected: str) -> None:
        """Passes a character.

        Raises:
            ValueError: there is another one.
        """
        if self.peek() != expected:
            raise self.broken()
        self._place += 1

    def value(self) -> Any:
        """Parses the next value.

        Raises:
            ValueError: there is none.
        """
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._place)
            except RecursionError as error:
                raise self.broken() from error
            except ValueError as error:
                if len(self._text) - self._place > _LONGEST or not self._more():
                    raise self.broken() from error
                continue
            # A number may go on in the next block.
            if end == len(self._text) and self._more():
                continue
            self._place = end
            return value

    def _more(self) -> bool:
        """Reads at least as much again as is left, and forgets what was passed; returns False at the end."""
        if self._ended:
            return False
        self._begin += _bytes(self._text[: self._place])
        self._text = self._text[self._place :]
        self._place = 0
        block = self._file.read(max(_BLOCK, len(self._text)))
        self._ended = not block
        self._text += self._decoder.decode(block, final=self._ended)
        return True

    def broken(self) -> ValueError:
        """Returns the error for text that is not JSON here."""
        return ValueError(
            f"{self._where} is no JSON from byte {self.offset} on: write an object per line (jq -c '.[]')"
        )


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))


class JsonDocument(Format):
    """One JSON value with rows in it."""

    @functools.cached_property
    def _array(self) -> int | None:
        """Byte at which the array's first element may begin; None if the file is a single object.

        Raises:
            ValueError: the file is no JSON, or wraps several arrays.
        """
        with self.open() as file:
            text = _Text(file, 0, self.where)
            if text.peek() == "[":
                text.take("[")
                return text.offset
            return self._wrapped(text)

    def _wrapped(self, text: _Text) -> int | None:
        found: dict[str, int] = {}
        text.take("{")
        while text.peek() != "}":
            name = text.value()
            text.take(":")
            if text.peek() == "[":
                text.take("[")
                offset = text.offset
                if text.peek() == "{":
                    found[str(name)] = offset
                for _ in _elements(text):
                    pass
                text.take("]")
            else:
                text.value()
            if text.peek() == ",":
                text.take(",")
        field = self.options.get("field")
        if field is not None and field not in found:
            raise ValueError(f"{self.where} has no array of objects {field!r}; it has {', '.join(found) or 'none'}")
        if field is None and len(found) > 1:
            raise ValueError(
                f"{self.where} holds several arrays of objects, {', '.join(found)}: write the one that you want as "
                f"JSON lines (jq -c '.{next(iter(found))}[]')"
            )
        return found[field] if field is not None else next(iter(found.values()), None)

    def locate(self, every: int) -> Iterator[Span]:
        """See `Format.locate`.

        Raises:
            ValueError: the file is no JSON, or none of the first rows has a required column.
        """
        try:
            if names := self.names():
                self.columns.find(names, self.where)
            first_row, begin = 0, 0
            for row, offset in self._offsets():
                if row % every == 0:
                    if row:
                        yield Span(first_row=first_row, rows=row - first_row, offset=begin)
                    first_row, begin = row, offset
                last = row
            if self._rows:
                yield Span(first_row=first_row, rows=last + 1 - first_row, offset=begin)
        except DamagedError:
            yield Span(first_row=0, rows=1, offset=0, damaged=True)

    def _offsets(self) -> Iterator[tuple[int, int]]:
        """Yields number and byte of every row."""
        self._rows = 0
        if self._array is None:
            self._rows = 1
            yield 0, 0
            return
        with self.open() as file:
            text = _Text(file, self._array, self.where)
            for row, (offset, _) in enumerate(_elements(text)):
                self._rows = row + 1
                yield row, offset

    def names(self) -> list[str]:
        """See `Format.names`."""
        first = itertools.islice(self._from(None), _LOOKED_AT)
        rows = (nested_names(row) for row in first if isinstance(row, dict))
        return list(dict.fromkeys(itertools.chain.from_iterable(rows)))

    def records(self, span: Span) -> Iterator[Any]:
        """See `Format.records`."""
        return itertools.islice(self._from(span.offset), span.rows)

    def _from(self, offset: int | None) -> Iterator[Any]:
        """Yields the rows from a byte on, from the first one for None."""
        with self.open() as file:
            if self._array is None:
                yield _Text(file, 0, self.where).value()
            else:
                for _, value in _elements(_Text(file, self._array if offset is None else offset, self.where)):
                    yield value

    def fields(self, record: Any) -> Mapping[str, Any] | str:
        """See `Format.fields`."""
        return wanted_of(record, self.columns) if isinstance(record, dict) else "not an object"


def _elements(text: _Text) -> Iterator[tuple[int, Any]]:
    """Yields byte and value of each element, up to the end of the array."""
    while (character := text.peek()) != "]":
        if not character:
            raise text.broken()
        offset = text.offset
        yield offset, text.value()
        if text.peek() == ",":
            text.take(",")
        elif text.peek() != "]":
            raise text.broken()
