"""Reads Parquet files by row group and column; planning needs only their footer.

A shard reads only the row groups that it overlaps, only their wanted columns, and streams those. A
row group can be entered only at its start: to reach a shard in the middle, the group is decoded up
to there. So a process keeps the last few files open where it stopped; if it takes shards in order, it
decodes every row once, however large row groups are (pandas writes a million rows). Replicas that
share a file also decode each other's rows in between: if that matters, write row groups of a few
thousand rows.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from collector.data.formats.base import Format, Span, even_spans
from collector.data.formats.columns import class_names, dig, schema_names, top_level
from collector.data.formats.kept import Kept

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from typing import BinaryIO

    from collector.data.formats.columns import Columns

_BATCH = 512
_BUFFER = 4 << 20
_KEPT_FILES = 4


def table_rows(table: Any, names: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yields the rows of an Arrow table or batch, keyed by meaning instead of name or dotted path."""
    columns = [_column(table, name) for name in names.values()]
    return (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))


def _column(table: Any, path: str) -> list[Any]:
    name, inside = top_level(path, table.schema.names)
    values = _values(table.column(name))
    return [dig(value, inside)[0] for value in values] if inside else values


def _values(column: Any) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError):  # some value has no Python equivalent
        return [_value(scalar) for scalar in column]
    return values


def _value(scalar: Any) -> Any:
    """Converts a value to Python: invalid UTF-8 becomes surrogates, a time out of Python's range its number."""
    import pyarrow as pa

    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        scalar = scalar.value if pa.types.is_dictionary(scalar.type) else scalar
        is_text = hasattr(scalar, "as_buffer")
        return scalar.as_buffer().to_pybytes().decode(errors="surrogateescape") if is_text else []
    except (ValueError, OverflowError):
        return getattr(scalar, "value", None)


class _OpenFile:
    """An open file and the position where the last span ended."""

    def __init__(self, open_file: Callable[[], BinaryIO], columns: Columns, where: str) -> None:
        import pyarrow.parquet as pq

        self._file = open_file()
        # Without pre_buffer and with a buffer size, a column is streamed rather than loaded whole.
        self.parquet = pq.ParquetFile(self._file, pre_buffer=False, buffer_size=_BUFFER)
        self.names = columns.find(schema_names(self.parquet.schema_arrow), where)
        self._group, self._next, self._rest = -1, 0, None
        self._batches: Iterator[Any] = iter(())

    def close(self) -> None:
        """Closes the file."""
        self._batches, self._rest = iter(()), None
        self.parquet.close()
        self._file.close()

    def rows(self, group: int, rows: range) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields the given rows of a row group, numbered within the group."""
        if group != self._group or rows.start < self._next:
            self._enter(group)
        while self._next < rows.stop:
            batch = self._rest or next(self._batches)
            start, stop = max(0, rows.start - self._next), min(len(batch), rows.stop - self._next)
            first = self._next + start
            self._rest = batch.slice(stop) if stop < len(batch) else None
            self._next += stop
            if start < stop:
                yield from enumerate(table_rows(batch.slice(start, stop - start), self.names), first)

    def _enter(self, group: int) -> None:
        self._group, self._next, self._rest = group, 0, None
        columns = sorted(set(self.names.values()))
        # Arrow's threads might still be running when the interpreter exits.
        self._batches = self.parquet.iter_batches(_BATCH, row_groups=[group], columns=columns, use_threads=False)


_kept: Kept[_OpenFile] = Kept(_KEPT_FILES)


class Parquet(Format):
    """A Parquet file, planned from its footer and read by row group."""

    def locate(self, every: int) -> Iterator[Span]:
        """See `Format.locate`.

        Raises:
            ValueError: the file is not Parquet, or a column is missing.
        """
        schema, rows = self._footer
        self.columns.find(schema_names(schema), self.where)
        return even_spans(rows, every)

    @functools.cached_property
    def _footer(self) -> tuple[Any, int]:
        """Schema and number of rows."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        with self.open() as file:
            try:
                parquet = pq.ParquetFile(file)
            except (pa.ArrowInvalid, OSError) as error:
                raise ValueError(f"{self.where} cannot be read as Parquet: {error}") from error
            return parquet.schema_arrow, parquet.metadata.num_rows

    def names(self) -> list[str]:
        """See `Format.names`."""
        return schema_names(self._footer[0])

    def classes(self) -> Mapping[str, Sequence[str]]:
        """See `Format.classes`."""
        return class_names(self._footer[0].metadata)

    def read(self, span: Span, keep: Collection[int] | None) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
        """See `Format.read`; reads only row groups with a wanted row."""
        key = (self.where, self.version, self.columns)
        file = (_kept.take(key) if self.version else None) or _OpenFile(self.open, self.columns, self.where)
        try:
            for row, fields in self._rows(file, span, keep):
                if keep is None or row in keep:
                    yield row, fields
        except BaseException:
            # After an exception, or if the caller stopped early, the reader's position is unknown.
            file.close()
            raise
        if self.version:
            _kept.put(key, file)
        else:
            file.close()

    def _rows(
        self, file: _OpenFile, span: Span, keep: Collection[int] | None
    ) -> Iterator[tuple[int, Mapping[str, Any]]]:
        first_row = 0
        metadata = file.parquet.metadata
        for group in range(metadata.num_row_groups):
            end = first_row + metadata.row_group(group).num_rows
            rows = range(max(first_row, span.first_row), min(end, span.first_row + span.rows))
            if rows and (keep is None or any(row in keep for row in rows)):
                inside = range(rows.start - first_row, rows.stop - first_row)
                for row, fields in file.rows(group, inside):
                    yield first_row + row, fields
            first_row = end
