"""Splits files into rows: JSON lines and documents, CSV, TSV, plain text, Parquet and Arrow.

A format does two things with a file. `locate` finds, once and while planning, where every N-th row
begins; `read` then enters the file at such a place and yields the rows of one span. So no two
workers read the same rows, and a worker holds only one block of a file in memory.

Guarantees: every row is yielded exactly once, in file order, numbered from 0, either as its wanted
columns or as one of `REASONS` if it is unusable. Row boundaries do not depend on how the file was
cut. A UTF-8 byte order mark is skipped. `sources` decides where files are and what columns mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from collector.data.formats.arrow import Arrow
from collector.data.formats.base import BEYOND_VOCABULARY, PROMPT_TOO_LONG, REASONS, Format, Span, even_spans
from collector.data.formats.columns import Columns
from collector.data.formats.delimited import Csv, Tsv
from collector.data.formats.json_document import JsonDocument
from collector.data.formats.lines import JsonLines, Text
from collector.data.formats.parquet import Parquet, table_rows

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "BEYOND_VOCABULARY", "FORMATS", "PROMPT_TOO_LONG", "REASONS", "Columns", "Format", "Span", "even_spans",
    "table_rows",
]  # fmt: skip

FORMATS: Mapping[str, type[Format]] = {
    "jsonl": JsonLines,
    "csv": Csv,
    "tsv": Tsv,
    "parquet": Parquet,
    "arrow": Arrow,
    "json": JsonDocument,
    "txt": Text,
}
