"""Computes which GPU holds which expert, by the algorithm of DeepSeek's expert-parallelism load balancer (EPLB).

The algorithm is that of `rebalance_experts` in github.com/deepseek-ai/EPLB, written anew in numpy: it gives the same
placements. Among equal loads the first comes first, where EPLB leaves their order to torch, so that it may number
replicas of one expert otherwise. A layer has E logical experts and P physical ones, the slots that GPUs hold; an expert
with several slots is replicated, and its load is divided evenly among them. All layers are placed at once, each by its
own loads.

Axes: L layers (or any other rows of loads), E experts, P slots, N items to pack.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """The GPUs that hold the experts of a layer."""

    gpus: int
    nodes: int = 1
    """Machines, each with as many of the GPUs."""
    groups: int = 1
    """Groups of experts that a router chooses from together; those of a group stay on one node."""
    replicas: int | None = None
    """Slots in all, P (default: E, rounded up to a multiple of the GPUs)."""

    def slots(self, experts: int) -> int:
        """Returns P for a layer of E experts.

        Raises:
            ValueError: experts and slots cannot be divided like this.
        """
        for name, number in (("gpus", self.gpus), ("nodes", self.nodes), ("groups", self.groups)):
            if number < 1:
                raise ValueError(f"{name} takes a number from 1, got {number}")
        slots = -(-experts // self.gpus) * self.gpus if self.replicas is None else self.replicas
        if self.gpus % self.nodes:
            raise ValueError(f"{self.gpus} gpus cannot be divided evenly among {self.nodes} nodes")
        if experts % self.groups:
            raise ValueError(
                f"{experts} experts are not {self.groups} groups of one size: take the model's own groups, or 1"
            )
        if slots < experts or slots % self.gpus:
            least = -(-max(slots, experts) // self.gpus) * self.gpus
            raise ValueError(
                f"{slots} replicas in all cannot hold {experts} experts evenly on {self.gpus} gpus: take a multiple "
                f"of {self.gpus} that is not below {experts}, such as {least}"
            )
        return slots

    @property
    def is_hierarchical(self) -> bool:
        """Whether groups are divided among nodes first; otherwise all GPUs are treated as those of one node."""
        return self.groups % self.nodes == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Which expert each slot holds. GPU g of G holds the slots g P / G to (g + 1) P / G - 1."""

    expert_LP: NDArray[np.int64]
    """EPLB's phy2log."""
    slots_LEX: NDArray[np.int64]
    """The slots of each expert in the order of its replicas, padded with -1; EPLB's log2phy."""
    replicas_LE: NDArray[np.int64]
    """How many slots each expert has; EPLB's logcnt."""


def rebalance(load_LE: NDArray, cluster: Cluster) -> Placement:
    """Places experts such that GPUs have about the same load.

    Args:
        load_LE: loads, not negative, in any unit.
        cluster: the GPUs.

    Raises:
        ValueError: experts and slots cannot be divided like this.
    """
    experts = load_LE.shape[1]
    slots = cluster.slots(experts)
    load_LE = np.asarray(load_LE, np.float64)
    groups, nodes = (cluster.groups, cluster.nodes) if cluster.is_hierarchical else (1, 1)
    own_LE = _by_node(load_LE, groups, nodes)
    sorted_LE = np.take_along_axis(load_LE, own_LE, axis=1)
    # from here on the nodes of all layers are rows of their own
    within, rank, count = replicate(sorted_LE.reshape(-1, experts // nodes), slots // nodes)
    load = np.take_along_axis(sorted_LE.reshape(-1, experts // nodes) / count, within, axis=1)
    gpu, place = pack(load, cluster.gpus // nodes)
    slot = gpu * (slots // cluster.gpus) + place
    ordered = np.argsort(slot, axis=1)
    within, rank = (np.take_along_axis(each, ordered, axis=1) for each in (within, rank))
    expert = np.take_along_axis(own_LE.reshape(-1, experts // nodes), within, axis=1)
    return _placement(expert.reshape(-1, slots), rank.reshape(-1, slots), experts)


def in_order(layers: int, experts: int, slots: int) -> Placement:
    """Places experts without regard to loads: slot p holds expert p mod E, as SGLang's `trivial` location does."""
    slot = np.arange(slots)
    return _placement(np.tile(slot % experts, (layers, 1)), np.tile(slot // experts, (layers, 1)), experts)


def pack(load_LN: NDArray[np.float64], packs: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Divides items into packs of equally many: the heaviest first, each to the lightest pack that has room.

    Returns:
        The pack of each item, and its place there; both [L, N]. Ties go to the first item and pack.
    """
    rows, items = load_LN.shape
    size = items // packs
    if size == 1:
        return np.tile(np.arange(items), (rows, 1)), np.zeros((rows, items), np.int64)
    pack_LN, place_LN = np.empty((2, rows, items), np.int64)
    sum_LM, filled_LM = np.zeros((rows, packs)), np.zeros((rows, packs), np.int64)
    every = np.arange(rows)
    for item_L in np.argsort(-load_LN, axis=1, kind="stable").T:
        lightest_L = np.where(filled_LM < size, sum_LM, np.inf).argmin(axis=1)
        pack_LN[every, item_L], place_LN[every, item_L] = lightest_L, filled_LM[every, lightest_L]
        sum_LM[every, lightest_L] += load_LN[every, item_L]
        filled_LM[every, lightest_L] += 1
    return pack_LN, place_LN


def replicate(load_LE: NDArray[np.float64], slots: int) -> tuple[NDArray[np.int64], ...]:
    """Gives each expert a slot, and each further slot to the expert whose replicas have the largest load then.

    Returns:
        The expert of each slot and the number of that replica, both [L, P], and how many each expert has, [L, E].
    """
    rows, experts = load_LE.shape
    expert_LP, rank_LP = np.tile(np.arange(slots), (rows, 1)), np.zeros((rows, slots), np.int64)
    count_LE = np.ones((rows, experts), np.int64)
    every = np.arange(rows)
    for slot in range(experts, slots):
        heaviest_L = (load_LE / count_LE).argmax(axis=1)
        expert_LP[:, slot], rank_LP[:, slot] = heaviest_L, count_LE[every, heaviest_L]
        count_LE[every, heaviest_L] += 1
    return expert_LP, rank_LP, count_LE


def _by_node(load_LE: NDArray[np.float64], groups: int, nodes: int) -> NDArray[np.int64]:
    """Returns the experts of each node, one node after the other, [L, E]: whole groups, packed by their loads."""
    layers, experts = load_LE.shape
    node_LG, place_LG = pack(load_LE.reshape(layers, groups, experts // groups).sum(axis=2), nodes)
    group_LG = np.argsort(node_LG * groups + place_LG, axis=1)
    own = group_LG[:, :, None] * (experts // groups) + np.arange(experts // groups)
    return own.reshape(layers, experts)


def _placement(expert_LP: NDArray[np.int64], rank_LP: NDArray[np.int64], experts: int) -> Placement:
    layers, slots = expert_LP.shape
    row = np.arange(layers)[:, None]
    replicas_LE = np.zeros((layers, experts), np.int64)
    np.add.at(replicas_LE, (row, expert_LP), 1)
    slots_LEX = np.full((layers, experts, replicas_LE.max(initial=1)), -1)
    slots_LEX[row, expert_LP, rank_LP] = np.arange(slots)
    return Placement(expert_LP=expert_LP, slots_LEX=slots_LEX, replicas_LE=replicas_LE)
