"""The routing table: its columns, the arrays of a shard, and their encoding in Parquet.

One row per (router, token), router-major, tokens in document order inside a router. A row of an encoder's router refers
to a token of the encoder, any other to one of the decoder.

`e0 … e{k-1}` are the experts in the order of the model's own weights `w0 … w{k-1}`; where layers
differ in k, the columns beyond a layer's k are null. Models with a capacity limit also have
`d0 … d{k-1}`: whether the limit kept the pick from its expert (null for a router without one); the
weights stay what the router returned. `label` and `is_special` are repeated here, where they
cost next to nothing (run lengths), so that the aggregate queries need no join.

Encodings, by measurement: dictionaries for expert ids and labels, DELTA_BINARY_PACKED for `tok`,
BYTE_STREAM_SPLIT for floats, zstd. The three statistics are rounded to 12 significant bits (one
more than float16 has, at float32's range: relative error below 0.025 %), which nearly halves
them; weights are stored exactly as the model applied them.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from collector.store import tables

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from collector.store.tables import Layer

STATISTICS = ("entropy", "topk_mass", "margin")
PER_EXPERT = ("probabilities", "logits")
"""List columns with a value per expert, which a run may store."""


def expert_dtype(layers: Sequence[Layer]) -> np.dtype:
    """The narrowest unsigned type for expert ids; its maximum means 'never written'."""
    return np.dtype(np.uint8 if max(layer.n_experts for layer in layers) <= 255 else np.uint16)


def schema(layers: Sequence[Layer], stored: Sequence[str] = (), lacks: Sequence[str] = ()) -> pa.Schema:
    """Schema of the routing table for these routers.

    Args:
        layers: the routers.
        stored: those of `PER_EXPERT` that are stored.
        lacks: those of `weights` and `STATISTICS` that the source of an imported run did not have; they are null.
    """
    k_max = max(layer.top_k for layer in layers)
    k_min = min(layer.top_k for layer in layers)
    expert = pa.from_numpy_dtype(expert_dtype(layers))
    k_limited = max((layer.top_k for layer in layers if layer.has_capacity), default=0)
    all_limited = all(layer.has_capacity for layer in layers)
    fields = [
        pa.field("shard", pa.uint32(), nullable=False),
        pa.field("stack", tables.NAME, nullable=False),
        pa.field("layer", pa.uint8(), nullable=False),
        pa.field("tok", pa.uint32(), nullable=False),
        pa.field("label", tables.NAME, nullable=False),
        pa.field("is_special", pa.bool_(), nullable=False),
        *(pa.field(f"e{i}", expert, nullable=i >= k_min) for i in range(k_max)),
        *(pa.field(f"w{i}", pa.float32(), nullable=i >= k_min or "weights" in lacks) for i in range(k_max)),
        *(pa.field(f"d{i}", pa.bool_(), nullable=i >= k_min or not all_limited) for i in range(k_limited)),
        *(pa.field(name, pa.float32(), nullable=name in lacks) for name in STATISTICS),
    ]
    per_expert = [pa.field(name, pa.list_(pa.float32()), nullable=False) for name in PER_EXPERT if name in stored]
    return pa.schema(fields + per_expert)


def round_statistic(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rounds to 12 significant bits, to nearest; zero, infinities and NaN do not change."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(1 << 11)) & np.uint32(0xFFFFF000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


@dataclasses.dataclass(kw_only=True)
class LayerRouting:
    """The routing of one shard by one router; T tokens in document order."""

    geometry: Layer
    experts_tk: NDArray[np.unsignedinteger]
    """[T, k] expert ids in the order of the weights."""
    weights_tk: NDArray[np.float32] | None
    """[T, k] weights that the model applied; None if the source of an imported run did not have them."""
    statistics: dict[str, NDArray[np.float32]]
    """`entropy` (nats), `topk_mass`, `margin`: [T] each; those that the source has."""
    dropped_tk: NDArray[np.bool_] | None = None
    """[T, k] whether a capacity limit kept the pick from its expert, where the router has one."""
    per_expert_te: dict[str, NDArray[np.float32]] = dataclasses.field(default_factory=dict)
    """Those of `PER_EXPERT` that are stored: [T, E] each."""

    @classmethod
    def unwritten(cls, geometry: Layer, tokens: int, dtype: np.dtype, stored: Sequence[str]) -> LayerRouting:
        """Makes room for `tokens` rows, filled with values that no router returns (never zero)."""
        unwritten = np.iinfo(dtype).max
        return cls(
            geometry=geometry,
            experts_tk=np.full((tokens, geometry.top_k), unwritten, dtype),
            weights_tk=np.full((tokens, geometry.top_k), np.nan, np.float32),
            statistics={name: np.full(tokens, np.nan, np.float32) for name in STATISTICS},
            # A boolean has no value for 'never written', but drops are written together with experts.
            dropped_tk=np.zeros((tokens, geometry.top_k), bool) if geometry.has_capacity else None,
            per_expert_te={
                name: np.full((tokens, geometry.n_experts), np.nan, np.float32) for name in PER_EXPERT if name in stored
            },
        )

    def check(self) -> None:
        """Makes sure that every slot was written, with a value that a router can return.

        Raises:
            ValueError: a slot was left out, an id is not an expert, or a value is not finite.
        """
        where = self.geometry.name
        if self.experts_tk.size and int(self.experts_tk.max()) >= self.geometry.n_experts:
            raise ValueError(
                f"{where}: tokens without a recorded expert, or expert ids beyond {self.geometry.n_experts}"
            )
        weights = {} if self.weights_tk is None else {"weights": self.weights_tk}
        for name, values in {**weights, **self.statistics, **self.per_expert_te}.items():
            if not (finite := is_possible(name, values)).all():
                raise ValueError(f"{where}: {name} not finite for {int((~finite).sum())} values (NaN router?)")


def is_possible(name: str, values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Whether a router may return these values of a column: finite ones, and logits of minus infinity."""
    return np.isfinite(values) | ((name == "logits") & np.isneginf(values))


def rows(
    shard: int,
    layer: LayerRouting,
    schema: pa.Schema,
    *,
    label: pa.DictionaryArray,
    is_special: NDArray[np.bool_],
    first_tok: int = 0,
) -> pa.Table:
    """Builds the rows of one router: the next row group of the shard's file.

    Args:
        shard: number of the shard.
        layer: the routing of T tokens.
        schema: of the whole file, see `schema`.
        label: [T] each token's label.
        is_special: [T] whether the tokenizer added the token itself.
        first_tok: where the tokens of the router's stack begin among all tokens of the shard.
    """
    tokens = len(layer.experts_tk)
    k = layer.geometry.top_k
    columns: dict[str, pa.Array | NDArray] = {
        "shard": np.full(tokens, shard, np.uint32),
        "stack": tables.constant(layer.geometry.stack, tokens),
        "layer": np.full(tokens, layer.geometry.layer, np.uint8),
        "tok": np.arange(first_tok, first_tok + tokens, dtype=np.uint32),
        "label": label,
        "is_special": is_special,
        **{name: round_statistic(values) for name, values in layer.statistics.items()},
    }
    for i in range(k):
        columns[f"e{i}"] = layer.experts_tk[:, i]
        if layer.weights_tk is not None:
            columns[f"w{i}"] = layer.weights_tk[:, i]
        if layer.dropped_tk is not None:
            columns[f"d{i}"] = layer.dropped_tk[:, i]
    for name, values_te in layer.per_expert_te.items():
        offsets = np.arange(tokens + 1, dtype=np.int32) * layer.geometry.n_experts
        columns[name] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values_te.ravel()))
    arrays = [
        pa.array(columns[field.name], field.type) if field.name in columns else pa.nulls(tokens, field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """A writer with the measured encodings; close it before trusting the file."""
    dictionary = [
        f.name
        for f in schema
        if f.name in ("shard", "stack", "layer", "label") or (f.name[0] == "e" and f.name[1:].isdigit())
    ]
    floats = [f.name for f in schema if pa.types.is_float32(f.type)]
    return pq.ParquetWriter(
        path, schema, compression=tables.COMPRESSION, compression_level=tables.COMPRESSION_LEVEL,
        use_dictionary=dictionary, use_byte_stream_split=floats,
        column_encoding={"tok": "DELTA_BINARY_PACKED"}, write_statistics=["shard", "stack", "layer", "tok", "label"],
        store_schema=True,
    )  # fmt: skip
