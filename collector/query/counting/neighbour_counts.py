"""Computes the rows of the macro `neighbour_counts`: how alike the experts of neighbouring tokens are.

The recorder numbers the tokens of a shard in the order of their positions, document by document.

Memory, for each token of the run: 13 bytes, and the experts of one router at a time, as wide as they are recorded.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from collector.query.counting.rows import BATCH
from collector.query.numbering import Places, recorded_labels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from collector.query.counting.rows import Asked
    from collector.store.tables import Layer

_SCHEMA = pa.schema(
    [
        ("stack", pa.string()), ("layer", pa.uint8()), ("label", pa.string()), ("pairs", pa.int64()),
        ("same_top1", pa.int64()), ("any_shared", pa.int64()), ("shared", pa.int64()),
    ]
)  # fmt: skip
_ABSENT = 2**32 - 1


def rows(asked: Asked) -> pa.Table:
    """Compares neighbours for each router. Axes: N tokens of the run, T of a batch."""
    places, labels = Places.of_run(asked.cursor), recorded_labels(asked.cursor)
    is_followed_n = _is_followed(asked, places)
    found = [_SCHEMA.empty_table()]
    for router in asked.routers:
        sums = _compare(_read(asked, router, places, labels), is_followed_n, len(labels))
        found.append(_table(router, sums, labels))
    return pa.concat_tables(found)


def _is_followed(asked: Asked, places: Places) -> NDArray[np.bool_]:
    """Returns whether the token in the next place is the next one of the same document, of shape [N]."""
    doc_n, position_n = (
        places.column(asked.cursor.sql(f"select shard, tok, {name} from tokens"), np.uint32, _ABSENT)
        for name in ("doc", "position")
    )
    is_followed_n = np.zeros(places.tokens, bool)
    is_followed_n[:-1] = (doc_n[1:] == doc_n[:-1]) & (position_n[1:] == position_n[:-1] + 1)
    is_followed_n[places.ends] = False
    return is_followed_n


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Decided:
    """What a router decided about each token."""

    experts_kn: Sequence[NDArray]
    """k arrays, [N]."""
    top_n: NDArray | None
    """[N] experts of the highest weight, None without weights."""
    label_n: NDArray[np.uint32]
    """[N] numbers of labels from 1; 0 without one, `_ABSENT` where the token does not count."""


def _read(asked: Asked, router: Layer, places: Places, labels: Sequence[str]) -> _Decided:
    dtype = np.min_scalar_type(router.n_experts - 1)
    experts_kn = [np.zeros(places.tokens, dtype) for _ in range(router.top_k)]
    top_n = np.zeros(places.tokens, dtype) if asked.has_weights else None
    label_n = np.full(places.tokens, _ABSENT, np.uint32)
    columns = ["shard", "tok", "coalesce(place, 0)::uinteger"]
    for batch in asked.batches(router, columns, weights=asked.has_weights, names=labels):
        shard_t, tok_t, label_t = batch.columns
        place_t = places.of(shard_t, tok_t)
        label_n[place_t] = label_t
        for expert_n, expert_t in zip(experts_kn, batch.experts_kt, strict=True):
            expert_n[place_t] = expert_t
        if top_n is not None:
            top_n[place_t] = batch.highest()
    return _Decided(experts_kn=experts_kn, top_n=top_n, label_n=label_n)


def _compare(decided: _Decided, is_followed_n: NDArray[np.bool_], labels: int) -> NDArray[np.int64]:
    """Returns pairs, same_top1, any_shared and shared of each label, [labels + 1, 4]; the first has no label."""
    sums = np.zeros((labels + 1, 4), np.int64)
    last = len(is_followed_n) - 1
    for first in range(0, last, BATCH):
        now, following = slice(first, min(first + BATCH, last)), slice(first + 1, min(first + BATCH, last) + 1)
        label_t, top_n = decided.label_n[now], decided.top_n
        is_pair_t = is_followed_n[now] & (label_t != _ABSENT) & (decided.label_n[following] != _ABSENT)
        shared_t = np.zeros(len(label_t), np.min_scalar_type(len(decided.experts_kn)))
        for expert_n in decided.experts_kn:
            for other_n in decided.experts_kn:
                shared_t += expert_n[now] == other_n[following]
        same_t = np.zeros(len(label_t), bool) if top_n is None else top_n[now] == top_n[following]
        for column, value_t in enumerate((is_pair_t, same_t, shared_t > 0, shared_t)):
            summed = np.bincount(label_t[is_pair_t], value_t[is_pair_t], minlength=labels + 1)
            sums[:, column] += summed.astype(np.int64)
    return sums


def _table(router: Layer, sums: NDArray[np.int64], labels: Sequence[str]) -> pa.Table:
    occurring = np.flatnonzero(sums[:, 0])
    columns = {
        "stack": [router.stack] * len(occurring), "layer": [router.layer] * len(occurring),
        "label": pa.array([None, *labels], pa.string()).take(pa.array(occurring)),
    }  # fmt: skip
    counts = dict(zip(_SCHEMA.names[len(columns) :], sums[occurring].T, strict=True))
    return pa.table(columns | counts, schema=_SCHEMA)
