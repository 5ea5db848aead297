"""Plans the placement of a run's experts, and measures it on documents that it was not computed from."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from collector.query.placements import eplb
from collector.query.placements.balance import balancedness
from collector.query.traffic import Loads
from collector.store import tables

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from collector.query.placements.eplb import Cluster, Placement
    from collector.query.warehouse import Run
    from collector.store.tables import Layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacementPlan:
    """A placement of all routers of one stack; L layers with a router, E experts."""

    layers: Sequence[Layer]
    """The routers, one per row of the arrays."""
    cluster: Cluster
    mix: Mapping[str, float] | None
    """Shares of labels in the traffic; None for all documents as they are."""
    include_special: bool
    """Whether special tokens count."""
    load_LE: NDArray[np.int64]
    """Picks per million tokens, over all documents."""
    placement: Placement
    """Computed from all documents."""
    before_L: NDArray[np.float64]
    """Balancedness of experts in their order, in every other document of each label."""
    after_L: NDArray[np.float64]
    """Balancedness of a placement from the documents between them, measured in the same ones as `before_L`."""


def plan_placement(
    run: Run,
    cluster: Cluster,
    *,
    stack: str | None = None,
    mix: Mapping[str, float] | None = None,
    include_special: bool = False,
) -> PlacementPlan:
    """Computes the placement of a run's experts by their loads, and its balance on held-out documents.

    Args:
        run: the run.
        cluster: the GPUs.
        stack: which routers, where a run has those of several stacks.
        mix: shares of labels in the traffic, which sum to 1 (default: all documents as they are).
        include_special: also count the special tokens that the tokenizer added.

    Raises:
        ValueError: the run has several stacks, layers of different sizes, or lacks a label; experts cannot be divided
            among the GPUs; or there are too few documents to hold some out.
    """
    layers = _routers(run, stack)
    slots = cluster.slots(layers[0].n_experts)
    loads = Loads(run, layers, mix, include_special=include_special)
    held_out = loads.of(first=False)
    trivial = eplb.in_order(len(layers), layers[0].n_experts, slots)
    tried = eplb.rebalance(loads.of(first=True), cluster)
    load_LE = loads.of()
    return PlacementPlan(
        layers=layers, cluster=cluster, mix=mix, include_special=include_special, load_LE=load_LE,
        placement=eplb.rebalance(load_LE, cluster),
        before_L=balancedness(held_out, trivial, cluster.gpus), after_L=balancedness(held_out, tried, cluster.gpus),
    )  # fmt: skip


def _routers(run: Run, stack: str | None) -> list[Layer]:
    """The routers of a stack, by layer."""
    run.check(stack=stack)
    found = [one for one in tables.recorded_layers(run.info) if stack in (None, one.stack)]
    stacks = sorted({one.stack for one in found})
    if len(stacks) > 1:
        raise ValueError(f"the run has routers of {' and '.join(stacks)}: choose one with --stack")
    sizes = {one.n_experts: one.layer for one in reversed(found)}
    if len(sizes) > 1:
        told = " and ".join(f"{size} experts in layer {layer}" for size, layer in sorted(sizes.items()))
        raise ValueError(f"engines place layers with the same number of experts, and there are {told}")
    return sorted(found, key=lambda one: one.layer)
