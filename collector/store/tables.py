"""What a run writes: the Arrow schemas of its tables, and arrays -> tables -> Parquet files.

Tables per shard, each with a constant `shard` column so that files can be concatenated:

- `routing`: one row per (router, token), router-major, tokens in document order inside a router;
- `tokens`: one row per token that the model saw, in document order; of an encoder–decoder model first
  those of the encoder, then those of the decoder (its inputs: a start token, then the target's tokens);
- `documents`: one row per document, in the order of the source;
- `rejects`, only where there are any: one row per row of the source that became no document.

A router is named by `(stack, layer)`: `encoder` or `decoder`, and the model's own layer number; where
several routers share a layer, the stack says which (`decoder.mlp`). A row of an encoder's router
refers to a token of the encoder, any other to one of the decoder.

`e0 … e{k-1}` are the experts in the order of the model's own weights `w0 … w{k-1}`; where layers
differ in k, the columns beyond a layer's k are null. Models with a capacity limit also have
`d0 … d{k-1}`: whether the limit kept the pick from its expert (null for a router without one); the
weights stay what the router returned. `label` and `is_special` are repeated in `routing`, where they
cost next to nothing (run lengths), so that the aggregate queries need no join.

Encodings, by measurement: dictionaries for expert ids and labels, DELTA_BINARY_PACKED for `tok`,
BYTE_STREAM_SPLIT for floats, zstd. The three statistics are rounded to 12 significant bits (one
more than float16 has, at float32's range: relative error below 0.025 %), which nearly halves
them; weights are stored exactly as the model applied them. This module never opens a run.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

STATISTICS = ("entropy", "topk_mass", "margin")
COMPRESSION = "zstd"
COMPRESSION_LEVEL = 3
_NAME = pa.dictionary(pa.int32(), pa.string())

TOKENS_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.uint32(), nullable=False),
        pa.field("stack", _NAME, nullable=False),
        pa.field("tok", pa.uint32(), nullable=False),
        pa.field("doc", pa.uint32(), nullable=False),
        pa.field("position", pa.uint32(), nullable=False),
        pa.field("token_id", pa.uint32()),
        pa.field("is_special", pa.bool_(), nullable=False),
    ]
)
"""`token_id` is null throughout a run that drops it."""

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


def documents_schema(*, text: bool, target: bool = False) -> pa.Schema:
    """Schema of the documents table, with the text (and the target's text) only when it was asked for.

    `tokens` and `characters` are those of the text; `target_tokens` are the decoder's of an
    encoder–decoder model, null where no decoder was run.
    """
    fields = [
        pa.field("shard", pa.uint32(), nullable=False),
        pa.field("doc", pa.uint32(), nullable=False),
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("label", _NAME, nullable=False),
        pa.field("source", pa.string()),
        pa.field("parallel_id", pa.string()),
        pa.field("tokens", pa.uint32(), nullable=False),
        pa.field("target_tokens", pa.uint32()),
        pa.field("characters", pa.uint32(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
    ]
    texts = [name for name, wanted in (("text", text), ("target", text and target)) if wanted]
    return pa.schema(fields + [pa.field(name, pa.string(), nullable=False) for name in texts])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """Geometry of one router, which `stack` and `layer` name."""

    stack: str = "decoder"
    """`encoder` or `decoder`; behind a dot, what tells routers of the same layer apart."""
    layer: int
    """The model's own number of the layer."""
    n_experts: int
    """E, experts to choose from."""
    top_k: int
    """k, experts chosen per token."""
    has_capacity: bool = False
    """Whether a limit can keep a pick from its expert."""

    @property
    def token_stack(self) -> str:
        """`encoder` or `decoder`: the stack whose tokens it sees."""
        return self.stack.partition(".")[0]

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.stack} layer {self.layer}"


def recorded_layers(info: Mapping[str, Any]) -> tuple[Layer, ...]:
    """The routers that run.json names, in its order.

    Raises:
        KeyError, TypeError: it is not what a replica writes.
    """
    keys = [field.name for field in dataclasses.fields(Layer)]
    return tuple(Layer(**{key: one[key] for key in keys}) for one in info["layers"])


def expert_dtype(layers: Sequence[Layer]) -> np.dtype:
    """The narrowest unsigned type that holds every expert id and, as its maximum, 'never written'."""
    return np.dtype(np.uint8 if max(layer.n_experts for layer in layers) <= 255 else np.uint16)


def routing_schema(layers: Sequence[Layer], *, probabilities: bool) -> pa.Schema:
    """Schema of the routing table for routers of this geometry."""
    k_max = max(layer.top_k for layer in layers)
    k_min = min(layer.top_k for layer in layers)
    expert = pa.from_numpy_dtype(expert_dtype(layers))
    k_limited = max((layer.top_k for layer in layers if layer.has_capacity), default=0)
    all_limited = all(layer.has_capacity for layer in layers)
    fields = [
        pa.field("shard", pa.uint32(), nullable=False),
        pa.field("stack", _NAME, nullable=False),
        pa.field("layer", pa.uint8(), nullable=False),
        pa.field("tok", pa.uint32(), nullable=False),
        pa.field("label", _NAME, nullable=False),
        pa.field("is_special", pa.bool_(), nullable=False),
        *(pa.field(f"e{i}", expert, nullable=i >= k_min) for i in range(k_max)),
        *(pa.field(f"w{i}", pa.float32(), nullable=i >= k_min) for i in range(k_max)),
        *(pa.field(f"d{i}", pa.bool_(), nullable=i >= k_min or not all_limited) for i in range(k_limited)),
        *(pa.field(name, pa.float32(), nullable=False) for name in STATISTICS),
    ]
    if probabilities:
        fields.append(pa.field("probabilities", pa.list_(pa.float32()), nullable=False))
    return pa.schema(fields)


def constant(name: str, rows: int) -> pa.DictionaryArray:
    """A dictionary-encoded column that says the same in every row."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), [name])


def round_statistic(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rounds to 12 significant bits, to nearest; zero, infinities and NaN stay what they are."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(1 << 11)) & np.uint32(0xFFFFF000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


@dataclasses.dataclass(kw_only=True)
class LayerRouting:
    """The routing of one shard by one router; T tokens in document order."""

    geometry: Layer
    experts_tk: NDArray[np.unsignedinteger]
    """[T, k] expert ids in the order of the weights."""
    weights_tk: NDArray[np.float32]
    """[T, k] weights that the model applied."""
    statistics: dict[str, NDArray[np.float32]]
    """`entropy` (nats), `topk_mass`, `margin`: [T] each."""
    dropped_tk: NDArray[np.bool_] | None = None
    """[T, k] whether a capacity limit kept the pick from its expert, where the router has one."""
    probabilities_te: NDArray[np.float32] | None = None
    """[T, E] the router's full distribution, when stored."""

    @classmethod
    def unwritten(cls, geometry: Layer, tokens: int, dtype: np.dtype, *, probabilities: bool) -> LayerRouting:
        """Room for `tokens` rows, filled with values that no router returns (never zero)."""
        unwritten = np.iinfo(dtype).max
        return cls(
            geometry=geometry,
            experts_tk=np.full((tokens, geometry.top_k), unwritten, dtype),
            weights_tk=np.full((tokens, geometry.top_k), np.nan, np.float32),
            statistics={name: np.full(tokens, np.nan, np.float32) for name in STATISTICS},
            # No third value can mark what was not written, but drops are written where experts are.
            dropped_tk=np.zeros((tokens, geometry.top_k), bool) if geometry.has_capacity else None,
            probabilities_te=np.full((tokens, geometry.n_experts), np.nan, np.float32) if probabilities else None,
        )

    def check(self) -> None:
        """Every slot was written, with a value that a router can return.

        Raises:
            ValueError: a slot was left out, an id is not an expert, or a value is not finite.
        """
        where = self.geometry.name
        if self.experts_tk.size and int(self.experts_tk.max()) >= self.geometry.n_experts:
            raise ValueError(
                f"{where}: tokens without a recorded expert, or expert ids beyond {self.geometry.n_experts}"
            )
        arrays = {"weights": self.weights_tk, **self.statistics}
        if self.probabilities_te is not None:
            arrays["probabilities"] = self.probabilities_te
        for name, values in arrays.items():
            if not np.isfinite(values).all():
                raise ValueError(
                    f"{where}: {name} not finite for {int((~np.isfinite(values)).sum())} values (NaN router?)"
                )


def routing_table(
    shard: int,
    layer: LayerRouting,
    schema: pa.Schema,
    *,
    label: pa.DictionaryArray,
    is_special: NDArray[np.bool_],
    first_tok: int = 0,
) -> pa.Table:
    """The routing rows of one router: the next row group of the shard's file.

    Args:
        shard: number of the shard.
        layer: the routing of T tokens.
        schema: of the whole file, see `routing_schema`.
        label: [T] each token's label.
        is_special: [T] whether the tokenizer added the token itself.
        first_tok: where the tokens of the router's stack begin among all tokens of the shard.
    """
    tokens = len(layer.experts_tk)
    k = layer.geometry.top_k
    columns: dict[str, pa.Array | NDArray] = {
        "shard": np.full(tokens, shard, np.uint32),
        "stack": constant(layer.geometry.stack, tokens),
        "layer": np.full(tokens, layer.geometry.layer, np.uint8),
        "tok": np.arange(first_tok, first_tok + tokens, dtype=np.uint32),
        "label": label,
        "is_special": is_special,
        **{name: round_statistic(values) for name, values in layer.statistics.items()},
    }
    for i in range(k):
        columns[f"e{i}"] = layer.experts_tk[:, i]
        columns[f"w{i}"] = layer.weights_tk[:, i]
        if layer.dropped_tk is not None:
            columns[f"d{i}"] = layer.dropped_tk[:, i]
    if layer.probabilities_te is not None:
        values = pa.array(layer.probabilities_te.ravel())
        offsets = np.arange(tokens + 1, dtype=np.int32) * layer.geometry.n_experts
        columns["probabilities"] = pa.ListArray.from_arrays(pa.array(offsets), values)
    arrays = [
        pa.array(columns[field.name], field.type) if field.name in columns else pa.nulls(tokens, field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def routing_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """A writer with the measured encodings; close it before trusting the file."""
    dictionary = [
        f.name
        for f in schema
        if f.name in ("shard", "stack", "layer", "label") or (f.name[0] == "e" and f.name[1:].isdigit())
    ]
    floats = [f.name for f in schema if pa.types.is_float32(f.type)]
    return pq.ParquetWriter(
        path, schema, compression=COMPRESSION, compression_level=COMPRESSION_LEVEL,
        use_dictionary=dictionary, use_byte_stream_split=floats,
        column_encoding={"tok": "DELTA_BINARY_PACKED"}, write_statistics=["shard", "stack", "layer", "tok", "label"],
        store_schema=True,
    )  # fmt: skip


def write_table(path: Path, table: pa.Table) -> None:
    """Writes a small table (tokens, documents, rejects) with dictionaries where they help."""
    pq.write_table(table, path, compression=COMPRESSION, compression_level=COMPRESSION_LEVEL)
