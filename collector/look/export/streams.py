"""Exports a run's tables as CSV files or Delta tables, each as a stream of Arrow batches from the warehouse.

CSV (RFC 4180, UTF-8): text is quoted, numbers are not; an empty field is null, `""` is the empty text; probabilities
are one field such as `[0.1, 0.2]`, which DuckDB casts back to `float[]`. Floats are written with enough digits to
restore the same float.

Delta has no unsigned integers, so they become the next wider signed type. Each table is one transaction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from collector.capture.recorders import table_names

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from collector.query.warehouse import Run

_BATCH = 1 << 16
"""Rows of a batch, some 10 MB of a routing table."""
_CSV_TYPES = {"FLOAT[]": "varchar", "USMALLINT[]": "varchar", "UINTEGER[]": "varchar"}
_DELTA_TYPES = {
    "UTINYINT": "smallint", "USMALLINT": "integer", "UINTEGER": "bigint", "UBIGINT": "bigint",
    "USMALLINT[]": "integer[]", "UINTEGER[]": "bigint[]",
}  # fmt: skip


def write_csv(run: Run, folder: Path, *, gzip: bool) -> dict[str, int]:
    """Writes a file for each table that has rows, such as `routing.csv` or `routing.csv.gz`.

    Returns:
        Rows by table.
    """
    from pyarrow import csv

    options = csv.WriteOptions(quoting_style="needed")
    counts: dict[str, int] = {}
    for table in _nonempty(run):
        reader = _stream(run, table, _CSV_TYPES)
        path, compression = folder / f"{table}.csv{'.gz' if gzip else ''}", "gzip" if gzip else None
        with (
            pa.output_stream(path, compression=compression) as sink,
            csv.CSVWriter(sink, reader.schema, write_options=options) as writer,
        ):
            for batch in reader:
                writer.write_batch(batch)
                counts[table] = counts.get(table, 0) + batch.num_rows
    return counts


def write_delta(run: Run, folder: Path) -> dict[str, int]:
    """Writes a Delta table for each table that has rows, in a folder of the same name.

    Returns:
        Rows by table.

    Raises:
        ValueError: the package `deltalake` is not installed.
    """
    try:
        from deltalake import write_deltalake
    except ImportError as error:
        raise ValueError("Delta tables need a package: pip install 'moe-routing-collector[delta]'") from error

    counts: dict[str, int] = {}

    def counted(table: str, reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
        for batch in reader:
            counts[table] = counts.get(table, 0) + batch.num_rows
            yield batch

    for table in _nonempty(run):
        reader = _stream(run, table, _DELTA_TYPES)
        write_deltalake(folder / table, pa.RecordBatchReader.from_batches(reader.schema, counted(table, reader)))
    return counts


def _nonempty(run: Run) -> list[str]:
    tables = (*table_names(run.info), "vocab", "layers", *filter(run.has, ("arms", "components", "weights", "maps")))
    return [table for table in tables if run.sql(f"from {table} limit 1").fetchall()]


def _stream(run: Run, table: str, types: Mapping[str, str]) -> pa.RecordBatchReader:
    """Streams all rows of a table, converted to types that the format supports."""
    relation = run.sql(f"from {table}")
    casts = [
        f'"{column}"::{types[str(kind)]} as "{column}"'
        for column, kind in zip(relation.columns, relation.types, strict=True)
        if str(kind) in types
    ]
    replaced = f" replace ({', '.join(casts)})" if casts else ""
    reader = run.sql(f"select *{replaced} from {table}").to_arrow_reader(_BATCH)
    assert reader is not None
    return reader
