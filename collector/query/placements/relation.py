"""Gives queries the relation `placements`: where EPLB would put the experts, by the loads of each label.

Each placement comes from the first half of the label's documents (see the view `halves`), so that a query can measure
it in the second. `planned_for` is null for experts in their order, which no load decided.

The relation has a row for each number of gpus and replicas (null: E, rounded up to a multiple of the GPUs), stack,
layer, planned_for, expert, and gpu that holds one of its replicas, with the share of the expert's load that goes there.
Only the numbers of GPUs and replicas that a query asks for are computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from collector.query.placements import eplb
from collector.query.placements.balance import shares
from collector.query.placements.eplb import Cluster
from collector.store import tables

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import duckdb
    from numpy.typing import NDArray

    from collector.query.catalog import Value
    from collector.store.tables import Layer

NAME = "placements"
_PICKS = """
select layer, label, expert, sum(picks)::bigint as picks
from by_label('half_load', $stack, $layer, $labels, $include_special, false)
where is_first
group by layer, label, expert
"""
_SCHEMA = pa.schema(
    [
        ("gpus", pa.int32()), ("replicas", pa.int32()), ("stack", pa.string()), ("layer", pa.uint8()),
        ("planned_for", pa.string()), ("expert", pa.int32()), ("gpu", pa.int32()), ("share", pa.float64()),
    ]
)  # fmt: skip


def rows(cursor: duckdb.DuckDBPyConnection, layers: Sequence[Layer], values: Mapping[str, Value]) -> pa.Table:
    """Computes the rows.

    Args:
        cursor: where the query will run.
        layers: the run's routers.
        values: the query's parameters: gpus and replicas, and stack, layer, labels and include_special as usual.

    Raises:
        ValueError: experts cannot be divided among the GPUs like this.
    """
    cluster = Cluster(gpus=values["gpus"], replicas=values["replicas"])  # type: ignore[arg-type]
    chosen = {name: values[name] for name in ("layer", "labels", "include_special")}
    asked = tables.asked_layers(layers, values)
    found = [_SCHEMA.empty_table()]
    for stack in dict.fromkeys(one.stack for one in asked):
        counted = cursor.sql(_PICKS, params={"stack": stack, **chosen}).to_arrow_table()
        number_R = counted["layer"].to_numpy()
        own = (one for one in asked if one.stack == stack)
        found += [_of_router(one, counted.filter(number_R == one.layer), cluster) for one in own]
    return pa.concat_tables(found)


def _of_router(router: Layer, counted: pa.Table, cluster: Cluster) -> pa.Table:
    """The rows of one router, whose labels are the rows of loads."""
    labels, label = np.unique(counted["label"].to_numpy(zero_copy_only=False).astype(str), return_inverse=True)
    load_LE = np.zeros((len(labels), router.n_experts), np.int64)
    load_LE[label, counted["expert"].to_numpy()] = counted["picks"].to_numpy()
    trivial = eplb.in_order(1, router.n_experts, cluster.slots(router.n_experts))
    share_LEG = np.concatenate(
        [shares(trivial, cluster.gpus), shares(eplb.rebalance(load_LE, cluster), cluster.gpus)]
    )  # fmt: skip
    return _rows(router, cluster, [None, *labels.tolist()], share_LEG)


def _rows(
    router: Layer, cluster: Cluster, planned_for: Sequence[str | None], share_LEG: NDArray[np.float64]
) -> pa.Table:
    plan, expert, gpu = np.nonzero(share_LEG)
    columns = {
        "gpus": [cluster.gpus] * len(plan), "replicas": [cluster.replicas] * len(plan),
        "stack": [router.stack] * len(plan), "layer": [router.layer] * len(plan),
        "planned_for": pa.array(planned_for, pa.string()).take(plan), "expert": expert, "gpu": gpu,
        "share": share_LEG[plan, expert, gpu],
    }  # fmt: skip
    return tables.table_of(_SCHEMA, columns)
