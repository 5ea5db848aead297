"""The tables of a run that every recorder shares: their Arrow schemas, and how small tables are written.

Each table has a constant `shard` column, so that the files of several shards can be concatenated:

- `tokens`: one row per token that the model saw, in document order; of an encoder–decoder model first
  those of the encoder, then those of the decoder (its inputs: a start token, then the target's tokens);
- `documents`: one row per document, in the order of the source;
- `rejects`, only where there are any: one row per row of the source that became no document.

Beside them stand the tables of the recorders, such as `routing`. A router is named by `(stack, layer)`: `encoder` or
`decoder`, and the model's own layer number; where several routers share a layer, the stack says which (`decoder.mlp`).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray


COMPRESSION = "zstd"
COMPRESSION_LEVEL = 3
NAME = pa.dictionary(pa.int32(), pa.string())
"""Type of a column with few different names."""


def tokens_schema(run_format: int = 2, added: Sequence[pa.Field] = ()) -> pa.Schema:
    """Schema of the tokens table, with the columns that recorders add; runs of format 1 know no spans.

    `token_id` is null in a run with `--token-ids drop`. `span` is the label of the innermost span of the text that the
    token lies in, null outside of all.
    """
    fields = [
        pa.field("shard", pa.uint32(), nullable=False),
        pa.field("stack", NAME, nullable=False),
        pa.field("tok", pa.uint32(), nullable=False),
        pa.field("doc", pa.uint32(), nullable=False),
        pa.field("position", pa.uint32(), nullable=False),
        pa.field("token_id", pa.uint32()),
        pa.field("is_special", pa.bool_(), nullable=False),
    ]
    spans = [pa.field("span", NAME)] if run_format > 1 else []
    return pa.schema([*fields, *spans, *added])


REJECTS_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.uint32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("row", pa.uint64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)
"""`source` is its name in the plan and `row` the number of the row in it, from 0; never any text."""

VOCAB_SCHEMA = pa.schema(
    [
        pa.field("token_id", pa.uint32(), nullable=False),
        pa.field("token", pa.string(), nullable=False),
        pa.field("is_special", pa.bool_(), nullable=False),
    ]
)


WEIGHTS_SCHEMA = pa.schema(
    [
        pa.field("stack", NAME, nullable=False),
        pa.field("layer", pa.uint8(), nullable=False),
        pa.field("measure", NAME, nullable=False),
        pa.field("expert", pa.uint16(), nullable=False),
        pa.field("other_expert", pa.uint16(), nullable=False),
        pa.field("value", pa.float32(), nullable=False),
    ]
)
"""How alike the weights of two experts are, measure by measure; not of a shard, but of the run's model."""


MAPS_SCHEMA = pa.schema(
    [
        pa.field("stack", NAME, nullable=False),
        pa.field("layer", pa.uint8(), nullable=False),
        pa.field("method", NAME, nullable=False),
        pa.field("shard", pa.uint32(), nullable=False),
        pa.field("tok", pa.uint32(), nullable=False),
        pa.field("expert", pa.uint16(), nullable=False),
        pa.field("x", pa.float32(), nullable=False),
        pa.field("y", pa.float32(), nullable=False),
        pa.field("seed", pa.uint32(), nullable=False),
        pa.field("trustworthiness", pa.float32(), nullable=False),
    ]
)
"""A pick's output as a point of a map; `trustworthiness` is that of the whole map."""


def documents_schema(
    *, text: bool, target: bool = False, generated: bool = False, lacks: Sequence[str] = ()
) -> pa.Schema:  # fmt: skip
    """Schema of the documents table, with the text (and that of the target or answer) only when it was asked for.

    `tokens` and `characters` are those of the text, with what the model wrote; `target_tokens` are the decoder's of an
    encoder–decoder model, null where no decoder was run. Of what a model wrote, `prompt_tokens` says where it begins,
    and `stopped` whether a stop token ended it. `characters` and `stopped` are null in a run that lacks them.
    """
    fields = [
        pa.field("shard", pa.uint32(), nullable=False),
        pa.field("doc", pa.uint32(), nullable=False),
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("label", NAME, nullable=False),
        pa.field("source", pa.string()),
        pa.field("parallel_id", pa.string()),
        pa.field("tokens", pa.uint32(), nullable=False),
        pa.field("target_tokens", pa.uint32()),
        pa.field("characters", pa.uint32(), nullable="characters" in lacks),
        pa.field("truncated", pa.bool_(), nullable=False),
    ]
    if generated:
        fields.append(pa.field("prompt_tokens", pa.uint32(), nullable=False))
        fields.append(pa.field("stopped", pa.bool_(), nullable="stopped" in lacks))
    texts = {"text": text, "target": text and target, "answer": text and generated}
    return pa.schema(fields + [pa.field(name, pa.string(), nullable=False) for name, wanted in texts.items() if wanted])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """One router, named by `stack` and `layer`, with its number of experts."""

    stack: str = "decoder"
    """`encoder` or `decoder`; behind a dot, what tells routers of the same layer apart."""
    layer: int
    """The model's own number of the layer."""
    n_experts: int
    """E, the experts it chooses from."""
    top_k: int
    """k, the experts it chooses per token."""
    has_capacity: bool = False
    """Whether a limit can keep a pick from its expert."""

    @property
    def token_stack(self) -> str:
        """`encoder` or `decoder`: the stack whose tokens it sees."""
        return self.stack.partition(".")[0]

    @property
    def name(self) -> str:
        """Its name in messages."""
        return f"{self.stack} layer {self.layer}"


def lacking(info: Mapping[str, Any]) -> tuple[str, ...]:
    """What the source of an imported run did not have, by name: `weights`, `entropy` …; nothing of any other run."""
    return tuple(info.get("imported", {}).get("lacks", ()))


def has_answers(info: Mapping[str, Any]) -> bool:
    """Whether the run's documents have parts that a model wrote."""
    imported = "imported" in info and "prompt_tokens" not in lacking(info)
    return imported or bool(info["config"].get("generate"))


def recorded_layers(info: Mapping[str, Any]) -> tuple[Layer, ...]:
    """The routers that run.json names, in that order.

    Raises:
        KeyError, TypeError: it is not what a replica writes.
    """
    keys = [field.name for field in dataclasses.fields(Layer)]
    return tuple(Layer(**{key: one[key] for key in keys}) for one in info["layers"])


def asked_layers(layers: Iterable[Layer], values: Mapping[str, Any]) -> list[Layer]:
    """The routers that a query asks about: those of its parameters `stack` and `layer`, null for all."""
    stack, layer = values.get("stack"), values.get("layer")
    return [one for one in layers if stack in (None, one.stack) and layer in (None, one.layer)]


def constant(name: str, rows: int) -> pa.DictionaryArray:
    """A dictionary-encoded column with the same value in every row."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), [name])


def table_of(schema: pa.Schema, columns: Mapping[str, Any]) -> pa.Table:
    """Builds a table from columns of other, wider types."""
    arrays = [pa.array(columns[field.name]).cast(field.type, safe=False) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def with_lists(
    schema: pa.Schema, columns: Mapping[str, Any], lists: Mapping[str, NDArray[Any]], offsets: NDArray[np.integer]
) -> pa.Table:
    """Builds a table of which some columns are lists.

    Args:
        schema: of the table.
        columns: [R] the values of the other columns.
        lists: the values of the list columns, row after row.
        offsets: [R + 1] where each row's values start; the same for all lists.
    """
    starts, arrays = pa.array(offsets.astype(np.int32)), []
    for field in schema:
        if field.name in lists:
            values = pa.array(lists[field.name]).cast(field.type.value_type, safe=False)
            arrays.append(pa.ListArray.from_arrays(starts, values, type=field.type))
        else:
            arrays.append(pa.array(columns[field.name]).cast(field.type, safe=False))
    return pa.Table.from_arrays(arrays, schema=schema)


def write_table(path: Path, table: pa.Table) -> None:
    """Writes a table with pyarrow's default encodings: tokens, documents or rejects."""
    pq.write_table(table, path, compression=COMPRESSION, compression_level=COMPRESSION_LEVEL)
