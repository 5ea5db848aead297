"""Counts the decisions of one router in one shard, document by document.

Axes: T tokens, k picks of each, E experts; G groups, each the ordinary or the special tokens of one document; N cells,
each an expert that a group chose at least once. The counting uses numpy on the committed files, not the SQL of the
views, so that the views can verify the result independently.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from collector.capture import routing_table
from collector.query.rollup.files import DOCUMENTS, SCHEMAS, STATISTICS
from collector.store import tables

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from collector.store.tables import Layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardCounts:
    """Counts of one router in one shard."""

    shard: int
    layer: Layer
    doc_g: NDArray[np.int64]
    is_special_g: NDArray[np.bool_]
    sums_g: dict[str, NDArray[Any]]
    """Sums over each group's tokens, by scalar column of the rollup; those that the run has."""
    group_n: NDArray[np.int64]
    """Index of the cell's group, ascending."""
    expert_n: NDArray[np.int64]
    """The cell's expert, ascending within a group."""
    picks_n: NDArray[np.int64]
    top1_n: NDArray[np.int64] | None
    """None if the run lacks weights, which tell the highest one."""
    weight_sum_n: NDArray[Any] | None
    """Sum of the weights, in float64; None if the run lacks them."""

    def table(self) -> pa.Table:
        """Returns the router's rows of the rollup, by document."""
        schema, groups = SCHEMAS[DOCUMENTS], len(self.doc_g)
        columns = {
            "stack": tables.constant(self.layer.stack, groups), "layer": np.full(groups, self.layer.layer),
            "shard": np.full(groups, self.shard), "doc": self.doc_g, "is_special": self.is_special_g, **self.sums_g,
        }  # fmt: skip
        columns |= {name: pa.nulls(groups) for name in STATISTICS if name not in self.sums_g}
        lists = {
            "experts": self.expert_n, "picks": self.picks_n, "top1": or_nulls(self.top1_n, len(self.expert_n)),
            "weight_sums": or_nulls(self.weight_sum_n, len(self.expert_n)),
        }  # fmt: skip
        return tables.with_lists(schema, columns, lists, np.searchsorted(self.group_n, np.arange(groups + 1)))


def or_nulls(values: NDArray[Any] | None, rows: int) -> NDArray[Any] | pa.Array:
    """Returns the values, or as many nulls."""
    return pa.nulls(rows) if values is None else values


def count(
    shard: int, layer: Layer, routing: Path, doc_t: NDArray[np.int64], lacks: Sequence[str] = ()
) -> ShardCounts:  # fmt: skip
    """Counts the rows of one router, all of which are in memory at once.

    Args:
        shard: number of the shard.
        layer: the router.
        routing: the shard's routing file.
        doc_t: [T] document of each token.
        lacks: what the source of an imported run did not have.
    """
    own = [("stack", "=", layer.stack), ("layer", "=", layer.layer)]
    rows = pq.read_table(routing, columns=["tok", *columns_of(layer, lacks)], filters=own)
    return count_rows(shard, layer, rows, doc_t[rows["tok"].to_numpy()], lacks)


def count_rows(
    shard: int, layer: Layer, rows: pa.Table, doc_t: NDArray[np.int64], lacks: Sequence[str] = ()
) -> ShardCounts:  # fmt: skip
    """Counts rows of one router.

    Args:
        shard: number of their shard.
        layer: the router.
        rows: T rows with the columns of `columns_of`.
        doc_t: [T] document of each row, or another group of tokens.
        lacks: what the source of an imported run did not have.
    """
    key_t = 2 * doc_t + rows["is_special"].to_numpy()
    key_g, group_t = np.unique(key_t, return_inverse=True)
    experts_tk = _picks(rows, "e", layer)
    weights_tk = None if "weights" in lacks else _picks(rows, "w", layer)
    cells_tk = group_t[:, None] * layer.n_experts + experts_tk
    size = len(key_g) * layer.n_experts
    picks = np.bincount(cells_tk.ravel(), minlength=size)
    chosen_n = np.flatnonzero(picks)
    top1 = weight_sum = None
    if weights_tk is not None:
        top_t = np.take_along_axis(cells_tk, weights_tk.argmax(axis=1)[:, None], axis=1).ravel()  # first among equals
        top1 = np.bincount(top_t, minlength=size)[chosen_n]
        weight_sum = np.bincount(cells_tk.ravel(), weights_tk.ravel(), minlength=size)[chosen_n]
    return ShardCounts(
        shard=shard, layer=layer, doc_g=key_g // 2, is_special_g=key_g % 2 == 1,
        sums_g={
            name: np.bincount(group_t, values, minlength=len(key_g))
            for name, values in _of_tokens(rows, layer, weights_tk, lacks).items()
        },
        group_n=chosen_n // layer.n_experts, expert_n=chosen_n % layer.n_experts, picks_n=picks[chosen_n],
        top1_n=top1, weight_sum_n=weight_sum,
    )  # fmt: skip


def columns_of(layer: Layer, lacks: Sequence[str] = ()) -> list[str]:
    """Returns the columns of `routing` that are counted."""
    letters = "e" + ("" if "weights" in lacks else "w") + ("d" if layer.has_capacity else "")
    picks = [f"{letter}{i}" for letter in letters for i in range(layer.top_k)]
    return ["is_special", *picks, *(name for name in routing_table.STATISTICS if name not in lacks)]


def _picks(rows: pa.Table, letter: str, layer: Layer) -> NDArray:
    """Returns the columns of the k picks that begin with a letter, as an array of shape [T, k]."""
    columns = [rows[f"{letter}{i}"].to_numpy() for i in range(layer.top_k)]
    return np.stack(columns, axis=1)


def _of_tokens(
    rows: pa.Table, layer: Layer, weights_tk: NDArray[np.float32] | None, lacks: Sequence[str]
) -> dict[str, NDArray]:  # fmt: skip
    """Returns the contribution of each token, of shape [T], by scalar column of the rollup."""
    dropped_t = _picks(rows, "d", layer).sum(axis=1) if layer.has_capacity else np.zeros(len(rows), np.int64)
    recorded = {"router_entropy": "entropy", "topk_mass": "topk_mass", "margin": "margin"}
    return {
        "tokens": np.ones(len(rows)),
        **({} if weights_tk is None else {"weight_entropy": _entropy(weights_tk)}),
        **{name: rows[column].to_numpy() for name, column in recorded.items() if column not in lacks},
        "dropped_picks": dropped_t,
        "dropped_tokens": dropped_t > 0,
    }


def _entropy(weights_tk: NDArray[np.float32]) -> NDArray[np.float64]:
    """[T] entropy of each token's weights, in nats."""
    positive_tk = np.where(weights_tk > 0, weights_tk, 0).astype(np.float64)
    share_tk = np.divide(
        positive_tk, weights_tk.sum(axis=1, dtype=np.float64)[:, None], out=np.ones_like(positive_tk),
        where=positive_tk > 0,
    )  # fmt: skip
    return np.asarray(-(share_tk * np.log(share_tk)).sum(axis=1))
