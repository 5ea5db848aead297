"""Parquet: planned from the footer, read by row group and column.

A shard reads only the row groups that it overlaps, of them only the wanted columns, and streams
those. The row group is the unit of reading: where shards are much smaller than row groups, each
shard decodes its row group from the start, so write row groups of a few thousand rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from collector.formats.base import Format, Span, even_spans

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

_BATCH = 512
_BUFFER = 4 << 20


def table_rows(table: Any, names: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """The rows of an Arrow table or batch, by meaning instead of name."""
    columns = [_values(table.column(name)) for name in names.values()]
    return (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))


def _values(column: Any) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # writers may have put anything into a string column
        import pyarrow as pa

        return [value and value.decode(errors="surrogateescape") for value in column.cast(pa.binary()).to_pylist()]


class Parquet(Format):
    """Parquet: planned from the footer alone, read by row group."""

    def locate(self, every: int) -> Iterator[Span]:
        """See `Format.locate`.

        Raises:
            ValueError: a column is missing.
        """
        import pyarrow.parquet as pq

        with self.open() as file:
            parquet = pq.ParquetFile(file)
            self.columns.find(parquet.schema_arrow.names, self.where)
            return even_spans(parquet.metadata.num_rows, every)

    def read(self, span: Span, keep: Collection[int] | None) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
        """See `Format.read`; touches only row groups with a wanted row."""
        import pyarrow.parquet as pq

        with self.open() as file:
            # Without pre_buffer and with a buffer, a column is streamed rather than loaded whole.
            parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER)
            first_row = 0
            for group in range(parquet.num_row_groups):
                end = first_row + parquet.metadata.row_group(group).num_rows
                rows = range(max(first_row, span.first_row), min(end, span.first_row + span.rows))
                if rows and (keep is None or any(row in keep for row in rows)):
                    for row, fields in self._read_group(
                        parquet, group, range(rows.start - first_row, rows.stop - first_row)
                    ):
                        if keep is None or first_row + row in keep:
                            yield first_row + row, fields
                first_row = end

    def _read_group(self, parquet: Any, group: int, rows: range) -> Iterator[tuple[int, dict[str, Any]]]:
        """The given rows of a row group, numbered inside it."""
        names = self.columns.find(parquet.schema_arrow.names, self.where)
        first = 0
        for batch in parquet.iter_batches(_BATCH, row_groups=[group], columns=sorted(set(names.values()))):
            wanted = range(max(first, rows.start), min(first + len(batch), rows.stop))
            if wanted:
                yield from zip(wanted, table_rows(batch.slice(wanted.start - first, len(wanted)), names), strict=True)
            first += len(batch)
            if first >= rows.stop:
                return
