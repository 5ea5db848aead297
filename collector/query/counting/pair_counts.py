"""Computes the rows of the macro `pair_counts`: which experts are chosen together.

Memory: a batch of rows, and for each router a few numbers per pair of experts.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from collector.query.counting.rows import Asked, Batch
    from collector.store.tables import Layer

_SCHEMA = pa.schema(
    [
        ("stack", pa.string()), ("layer", pa.uint8()), ("expert", pa.int32()), ("other_expert", pa.int32()),
        ("picks", pa.int64()), ("together", pa.int64()),
    ]
)  # fmt: skip


def rows(asked: Asked) -> pa.Table:
    """Counts the pairs of each router."""
    adjacent = asked.values["mode"] == "released"
    found = [_SCHEMA.empty_table(), *(_of_router(asked, router, adjacent=adjacent) for router in asked.routers)]
    return pa.concat_tables(found)


def _of_router(asked: Asked, router: Layer, *, adjacent: bool) -> pa.Table:
    experts = router.n_experts
    picks_e, together_ee = np.zeros(experts, np.int64), np.zeros((experts, experts), np.int64)
    for batch in asked.batches(router, [], weights=adjacent):
        expert_kt = [expert_t.astype(np.int64) for expert_t in (_by_weight(batch) if adjacent else batch.experts_kt)]
        for i, expert_t in enumerate(expert_kt):
            picks_e += np.bincount(expert_t, minlength=experts)
            start_t = expert_t * experts
            for other_t in expert_kt[i + 1 : i + 2 if adjacent else None]:
                together_ee += np.bincount(start_t + other_t, minlength=experts**2).reshape(experts, experts)
    together_ee += together_ee.T
    expert, other = np.nonzero(together_ee)
    columns = {
        "stack": [router.stack] * len(expert), "layer": [router.layer] * len(expert), "expert": expert,
        "other_expert": other, "picks": picks_e[expert], "together": together_ee[expert, other],
    }  # fmt: skip
    return pa.table(columns, schema=_SCHEMA)


def _by_weight(batch: Batch) -> Sequence[NDArray]:
    """Returns the experts by weight, highest first, those of equal weight in the model's own order."""
    weights_kt = batch.weights_kt
    if all((higher >= lower).all() for higher, lower in itertools.pairwise(weights_kt)):
        return batch.experts_kt  # most models sort them
    order_kt = np.argsort(-np.stack(weights_kt), axis=0, kind="stable")
    return [*np.take_along_axis(np.stack(batch.experts_kt), order_kt, axis=0)]
