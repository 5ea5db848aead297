"""Writes the tables of a shard to scratch files, checks them, and publishes them as the parts of an attempt.

Guarantees: a published file has exactly the rows of its shard. This is checked in its footer, because a Parquet writer
that an exception closes leaves a valid file that lacks rows. Recordings are checked before they are encoded, so a
token without a result stops the shard. Text goes to the documents table if it was asked for, and nowhere else; token
ids are kept, hashed or dropped as the settings say.

A part counts only once a commit record names it; the replica commits.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from collector.store import tables
from collector.store.run_directory import REJECTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from collector.capture.batches import TokenTable
    from collector.capture.recorder import Recording
    from collector.capture.shard_text import ShardText
    from collector.data.sources import BadRow
    from collector.pipeline import Stopwatch
    from collector.store.run_directory import Part, RunDirectory
    from collector.token_ids import TokenIds


class PartWriter:
    """Writes and publishes the parts of one run's shards."""

    def __init__(
        self, run: RunDirectory, *, documents: pa.Schema, token_ids: TokenIds,
        hashed_ids: NDArray[np.uint32] | None = None, added_fields: Sequence[pa.Field] = (),
    ) -> None:  # fmt: skip
        """Touches nothing on the store yet.

        Args:
            run: where the parts go.
            documents: schema of the documents table.
            token_ids: what is recorded of token ids.
            hashed_ids: [vocabulary] the number that replaces each id, for `hash`.
            added_fields: columns that the recorders add to the tokens table.
        """
        self.run = run
        self.documents_schema = documents
        self._has_characters = not documents.field("characters").nullable
        self.token_ids = token_ids
        self.hashed_ids = hashed_ids
        self.added_fields = added_fields

    def write(
        self, shard: int, attempt: str, text: ShardText, recordings: Sequence[Recording], watch: Stopwatch
    ) -> dict[str, Part]:
        """Writes the tables to scratch, reads their footers again, and publishes them.

        Raises:
            ValueError: a recording lacks a token, or holds a value that no model returns.
        """
        with self.run.scratch() as scratch:
            folder = Path(scratch)
            with watch("encode"):
                for recording in recordings:
                    recording.check()
                expected = self._write_tables(folder, shard, text, recordings)
            for table, rows in expected.items():
                found = pq.read_metadata(folder / table).num_rows
                if found != rows:
                    raise RuntimeError(f"{table} part of shard {shard} holds {found} rows instead of {rows}")
            with watch("publish"):
                return {
                    table: self.run.publish_part(folder / table, shard, attempt, table, rows)
                    for table, rows in expected.items()
                }

    def _write_tables(
        self, folder: Path, shard: int, text: ShardText, recordings: Sequence[Recording]
    ) -> dict[str, int]:
        """Writes a file per table; returns the rows that each must hold."""
        expected: dict[str, int] = {}
        for recording in recordings:
            expected |= recording.write(folder, shard, text)
        added = {name: column for recording in recordings for name, column in recording.token_columns().items()}
        tables.write_table(folder / "tokens", self._tokens_table(shard, text, added))
        tables.write_table(folder / "documents", self._documents_table(shard, text))
        expected |= {"tokens": text.count, "documents": len(text.documents)}
        if text.bad:
            tables.write_table(folder / REJECTS, _rejects_table(shard, text.bad))
            expected[REJECTS] = len(text.bad)
        return expected

    def _tokens_table(self, shard: int, text: ShardText, added: Mapping[str, pa.Array]) -> pa.Table:
        schema = tables.tokens_schema(added=self.added_fields)
        parts = []
        for stack, tokens in text.tokens.items():
            count, first = len(tokens.ids), text.first_tok(stack)
            columns: dict[str, Any] = {
                "shard": np.full(count, shard),
                "stack": tables.constant(stack, count),
                "tok": np.arange(first, first + count),
                "doc": tokens.doc,
                "position": tokens.position,
                "token_id": self._recorded(tokens.ids),
                "is_special": tokens.is_special,
                "span": _spans(tokens),
                **{name: column.slice(first, count) for name, column in added.items()},
            }
            parts.append(pa.Table.from_arrays([pa.array(columns[f.name]).cast(f.type) for f in schema], schema=schema))
        return pa.concat_tables(parts)

    def _recorded(self, ids: NDArray[np.int64]) -> Any:
        """[T] the recorded token ids: as they are, hashed, or null."""
        if self.token_ids == "drop":
            return pa.nulls(len(ids))
        return ids if self.hashed_ids is None else self.hashed_ids[ids]

    def _documents_table(self, shard: int, text: ShardText) -> pa.Table:
        documents, table = text.documents, next(iter(text.tokens.values()))
        columns: dict[str, Any] = {
            "shard": [shard] * len(documents),
            "doc": range(len(documents)),
            "doc_id": [document.id for document in documents],
            "label": [document.label for document in documents],
            "source": [document.source for document in documents],
            "parallel_id": [document.parallel_id for document in documents],
            "tokens": table.lengths,
            "target_tokens": text.tokens["decoder"].lengths if len(text.tokens) > 1 else [None] * len(documents),
            "characters": text.characters if self._has_characters else [None] * len(documents),
            "truncated": text.truncated,
            "prompt_tokens": table.prompt_lengths,
            "stopped": [None] * len(documents) if table.stopped is None else table.stopped,
            "text": [document.text for document in documents],
            "target": [document.target for document in documents],
            "answer": text.answers,
        }
        arrays = [
            pa.array(columns[f.name], pa.string()).dictionary_encode()
            if pa.types.is_dictionary(f.type)
            else pa.array(columns[f.name], f.type)
            for f in self.documents_schema
        ]
        return pa.Table.from_arrays(arrays, schema=self.documents_schema)


def _spans(tokens: TokenTable) -> pa.Array:
    """[T] the label of the span that each token lies in, or null."""
    if tokens.span is None:
        return pa.nulls(len(tokens.ids), pa.string())
    labels = pa.array(tokens.span_labels, pa.string())
    return pa.DictionaryArray.from_arrays(pa.array(tokens.span.astype(np.int32), mask=tokens.span < 0), labels)


def _rejects_table(shard: int, bad: list[BadRow]) -> pa.Table:
    rows = [{"shard": shard, "source": row.source, "row": row.row, "reason": row.reason} for row in bad]
    return pa.Table.from_pylist(rows, schema=tables.REJECTS_SCHEMA)
