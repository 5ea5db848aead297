"""Computes the rows of the macro `neighbour_counts`: how alike the experts of neighbouring tokens are.

The recorder numbers the tokens of a shard in the order of their positions, document by document.

Memory, for each token of the run: 13 bytes, and the experts of one router at a time, as wide as they are recorded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from collector.query.counting.rows import BATCH, Places, recorded_labels

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
    """Compares neighbours for each router."""
    places, labels = Places(asked.cursor), recorded_labels(asked.cursor)
    is_followed_n = _is_followed(places)
    found = (_of_router(asked, router, places, is_followed_n, labels) for router in asked.routers)
    return pa.concat_tables([_SCHEMA.empty_table(), *found])


def _is_followed(places: Places) -> NDArray[np.bool_]:
    """Returns whether the token in the next place is the next one of the same document, of shape [N]."""
    doc_n, position_n = places.column("doc", _ABSENT), places.column("position", _ABSENT)
    is_followed_n = np.zeros(places.count, bool)
    is_followed_n[:-1] = (doc_n[1:] == doc_n[:-1]) & (position_n[1:] == position_n[:-1] + 1)
    is_followed_n[places.ends] = False
    return is_followed_n


def _of_router(
    asked: Asked, router: Layer, places: Places, is_followed_n: NDArray[np.bool_], labels: Sequence[str]
) -> pa.Table:
    dtype = np.min_scalar_type(router.n_experts - 1)
    experts_kn = [np.zeros(places.count, dtype) for _ in range(router.top_k)]
    top_n = np.zeros(places.count if asked.has_weights else 0, dtype)
    label_n = np.full(places.count, _ABSENT, np.uint32)
    columns = ["shard", "tok", "coalesce(place, 0)::uinteger"]
    for batch in asked.batches(router, columns, weights=asked.has_weights, names=labels):
        shard_t, tok_t, label_t = batch.columns
        place_t = places.of(shard_t, tok_t)
        label_n[place_t] = label_t
        for expert_n, expert_t in zip(experts_kn, batch.experts_kt, strict=True):
            expert_n[place_t] = expert_t
        if asked.has_weights:
            top_n[place_t] = batch.highest()
    # [labels, 4]: pairs, same_top1, any_shared, shared; the first row is that of tokens without a label
    counts = np.zeros((len(labels) + 1, 4), np.int64)
    for first in range(0, places.count - 1, BATCH):
        now = slice(first, min(first + BATCH, places.count - 1))
        following = slice(now.start + 1, now.stop + 1)
        is_pair_t = is_followed_n[now] & (label_n[now] != _ABSENT) & (label_n[following] != _ABSENT)
        shared_t = np.zeros(len(is_pair_t), np.min_scalar_type(router.top_k))
        for expert_n in experts_kn:
            for other_n in experts_kn:
                shared_t += expert_n[now] == other_n[following]
        same_t = top_n[now] == top_n[following] if asked.has_weights else np.zeros(len(is_pair_t), bool)
        label_p = label_n[now][is_pair_t]
        for column, value_t in enumerate((is_pair_t, same_t, shared_t > 0, shared_t)):
            weighed = np.bincount(label_p, value_t[is_pair_t], minlength=len(counts))
            counts[:, column] += weighed.astype(np.int64)
    occurring = np.flatnonzero(counts[:, 0])
    columns_of_counts = dict(zip(_SCHEMA.names[3:], counts[occurring].T, strict=True))
    names = pa.array([None, *labels], pa.string()).take(pa.array(occurring))
    own = {"stack": [router.stack] * len(occurring), "layer": [router.layer] * len(occurring), "label": names}
    return pa.table(own | columns_of_counts, schema=_SCHEMA)
