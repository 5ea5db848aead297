"""A shard's results -> its published parts: tables, scratch files, checked footers, files of an attempt.

Guarantees: what is published holds exactly the rows that the shard has, for a Parquet writer that an exception
closes leaves a valid file that lacks rows. Every router's arrays are checked before they are encoded, so a
token without a recorded expert stops the shard. Text goes to the documents table when it was asked for, and
nowhere else; of token ids what the run's settings say.

A part counts once a commit record names it: that is the replica's business.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from collector.store import tables
from collector.store.run_directory import Part, Skipped

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from collector.capture.batches import TokenTable
    from collector.data.sources import BadRow, Document
    from collector.pipeline import Stopwatch
    from collector.store.run_directory import RunDirectory
    from collector.store.tables import LayerRouting
    from collector.token_ids import TokenIds

_EXAMPLES = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardText:
    """The documents of a shard, tokenized, and the rows that became none."""

    documents: list[Document]
    tokens: dict[str, TokenTable]
    """Stack -> the tokens that it is given, in the order of the tokens table."""
    bad: list[BadRow]

    @property
    def count(self) -> int:
        """Tokens in all."""
        return sum(len(table.ids) for table in self.tokens.values())

    def first_tok(self, stack: str) -> int:
        """Where a stack's tokens begin in the tokens table."""
        before = list(self.tokens)[: list(self.tokens).index(stack)]
        return sum(len(self.tokens[each].ids) for each in before)

    @property
    def truncated(self) -> NDArray[np.bool_]:
        """[D] whether a text of the document was cut."""
        return np.logical_or.reduce([table.truncated for table in self.tokens.values()])

    @property
    def skipped(self) -> dict[str, Skipped]:
        """Reason -> how many rows became no document, and where the first few of them are."""
        where: dict[str, list[str]] = defaultdict(list)
        for row in self.bad:
            where[row.reason].append(row.where)
        return {r: Skipped(count=len(w), examples=tuple(w[:_EXAMPLES])) for r, w in sorted(where.items())}


class PartWriter:
    """Writes and publishes the parts of one run's shards."""

    def __init__(
        self, run: RunDirectory, *, routing: pa.Schema, documents: pa.Schema, token_ids: TokenIds,
        hashed_ids: NDArray[np.uint32] | None = None,
    ) -> None:  # fmt: skip
        """Prepares nothing on the store.

        Args:
            run: where the parts go.
            routing: schema of the routing table.
            documents: schema of the documents table.
            token_ids: what is recorded of token ids.
            hashed_ids: [vocabulary] what stands for each id, for `hash`.
        """
        self.run = run
        self.routing_schema = routing
        self.documents_schema = documents
        self.token_ids = token_ids
        self.hashed_ids = hashed_ids

    def write(
        self, shard: int, attempt: str, text: ShardText, routing: list[LayerRouting], watch: Stopwatch
    ) -> dict[str, Part]:
        """Writes the tables to scratch, re-reads their footers, publishes them.

        Raises:
            ValueError: a router returned what none may return, or nothing for a token.
        """
        with self.run.scratch() as scratch:
            folder = Path(scratch)
            with watch("encode"):
                for layer in routing:
                    layer.check()
                expected = self._write_tables(folder, shard, text, routing)
            for table, rows in expected.items():
                found = pq.read_metadata(folder / table).num_rows
                if found != rows:
                    raise RuntimeError(f"{table} part of shard {shard} holds {found} rows instead of {rows}")
            with watch("publish"):
                return {
                    table: self.run.publish_part(folder / table, shard, attempt, table, rows)
                    for table, rows in expected.items()
                }

    def _write_tables(self, folder: Path, shard: int, text: ShardText, routing: list[LayerRouting]) -> dict[str, int]:
        """Writes a file per table; returns the rows that each must hold."""
        self._write_routing(folder / "routing", shard, text, routing)
        tables.write_table(folder / "tokens", self._tokens_table(shard, text))
        tables.write_table(folder / "documents", self._documents_table(shard, text))
        rows = sum(len(layer.experts_tk) for layer in routing)
        expected = {"routing": rows, "tokens": text.count, "documents": len(text.documents)}
        if text.bad:
            tables.write_table(folder / "rejects", _rejects_table(shard, text.bad))
            expected["rejects"] = len(text.bad)
        return expected

    def _write_routing(self, path: Path, shard: int, text: ShardText, routing: list[LayerRouting]) -> None:
        labels = pa.array([document.label for document in text.documents], pa.string()).dictionary_encode()
        per_token = {stack: labels.take(pa.array(table.doc)) for stack, table in text.tokens.items()}
        with tables.routing_writer(path, self.routing_schema) as writer:
            for layer in routing:
                stack = layer.geometry.token_stack
                table = tables.routing_table(
                    shard, layer, self.routing_schema, label=per_token[stack],
                    is_special=text.tokens[stack].is_special, first_tok=text.first_tok(stack),
                )  # fmt: skip
                writer.write_table(table)

    def _tokens_table(self, shard: int, text: ShardText) -> pa.Table:
        schema = tables.TOKENS_SCHEMA
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
            }
            parts.append(pa.Table.from_arrays([pa.array(columns[f.name]).cast(f.type) for f in schema], schema=schema))
        return pa.concat_tables(parts)

    def _recorded(self, ids: NDArray[np.int64]) -> Any:
        """[T] what stands in the run for each token's id."""
        if self.token_ids == "drop":
            return pa.nulls(len(ids))
        return ids if self.hashed_ids is None else self.hashed_ids[ids]

    def _documents_table(self, shard: int, text: ShardText) -> pa.Table:
        documents = text.documents
        columns: dict[str, Any] = {
            "shard": [shard] * len(documents),
            "doc": range(len(documents)),
            "doc_id": [document.id for document in documents],
            "label": [document.label for document in documents],
            "source": [document.source for document in documents],
            "parallel_id": [document.parallel_id for document in documents],
            "tokens": next(iter(text.tokens.values())).lengths,
            "target_tokens": text.tokens["decoder"].lengths if len(text.tokens) > 1 else [None] * len(documents),
            "characters": [len(document.text) for document in documents],
            "truncated": text.truncated,
            "text": [document.text for document in documents],
            "target": [document.target for document in documents],
        }
        arrays = [
            pa.array(columns[f.name], pa.string()).dictionary_encode()
            if pa.types.is_dictionary(f.type)
            else pa.array(columns[f.name], f.type)
            for f in self.documents_schema
        ]
        return pa.Table.from_arrays(arrays, schema=self.documents_schema)


def _rejects_table(shard: int, bad: list[BadRow]) -> pa.Table:
    rows = [{"shard": shard, "source": row.source, "row": row.row, "reason": row.reason} for row in bad]
    return pa.Table.from_pylist(rows, schema=tables.REJECTS_SCHEMA)
