"""Reads Arrow IPC files and streams, such as `datasets` keeps in its cache, batch by batch.

A local file is mapped, so that passing over a batch costs next to nothing. Of a file behind a URL the batches before a
shard are read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from collector.data.formats.base import Format, Span, even_spans
from collector.data.formats.columns import class_names, schema_names, top_level
from collector.data.formats.parquet import table_rows

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

_ROWS = 512


class Arrow(Format):
    """An Arrow IPC file (Feather 2 included) or stream."""

    def _batches(self) -> Iterator[Any]:
        """Yields the schema, then all batches.

        Raises:
            ValueError: it is neither.
        """
        import pyarrow as pa

        with self.open() as file:
            try:
                local = isinstance(getattr(file, "name", None), str)
                source = pa.memory_map(file.name) if local else pa.PythonFile(file, "r")
                magic = source.read(6)
                source.seek(0)
                if magic == b"ARROW1":
                    reader = pa.ipc.open_file(source)
                    yield reader.schema
                    for number in range(reader.num_record_batches):
                        yield reader.get_batch(number)
                else:
                    stream = pa.ipc.open_stream(source)
                    yield stream.schema
                    yield from stream
            except (pa.ArrowInvalid, OSError) as error:
                raise ValueError(f"{self.where} cannot be read as Arrow: {str(error).splitlines()[0]}") from error

    def _schema(self) -> Any:
        return next(self._batches())

    def names(self) -> list[str]:
        """See `Format.names`."""
        return schema_names(self._schema())

    def classes(self) -> Mapping[str, Sequence[str]]:
        """See `Format.classes`."""
        return class_names(self._schema().metadata)

    def locate(self, every: int) -> Iterator[Span]:
        """See `Format.locate`.

        Raises:
            ValueError: the file is not Arrow, or a column is missing.
        """
        batches = self._batches()
        self.columns.find(schema_names(next(batches)), self.where)
        return even_spans(sum(batch.num_rows for batch in batches), every)

    def read(self, span: Span, keep: Collection[int] | None) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
        """See `Format.read`."""
        batches = self._batches()
        schema = next(batches)
        names = self.columns.find(schema_names(schema), self.where)
        wanted = sorted({top_level(name, schema.names)[0] for name in names.values()})
        first, stop = 0, span.first_row + span.rows
        for batch in batches:
            begin, end = max(span.first_row - first, 0), min(stop - first, batch.num_rows)
            for start in range(begin, end, _ROWS):
                piece = batch.select(wanted).slice(start, min(_ROWS, end - start))
                for row, fields in enumerate(table_rows(piece, names), first + start):
                    if keep is None or row in keep:
                        yield row, fields
            first += batch.num_rows
            if first >= stop:
                return
