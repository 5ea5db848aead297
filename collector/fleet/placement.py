"""The resources that a replica reserves, and how many replicas the nodes of a cluster hold.

Pure arithmetic over Ray's list of nodes. Nodes may differ: each holds as many replicas as fit
its own cores and GPUs, and only nodes with the wanted accelerator and labels count.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from collector.config import LaunchConfig, Spread

_ROUNDING = 1e-6
"""Ray counts resources in ten-thousandths, so 0.1 of a GPU fits ten times."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Node:
    """A live machine of the cluster."""

    id: str
    name: str
    cpus: float
    gpus: float
    accelerators: frozenset[str]
    labels: Mapping[str, str]

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Node:
        """Reads an entry of `ray.nodes()`."""
        resources = entry["Resources"]
        marks = (name.partition("accelerator_type:") for name in resources)
        return cls(
            id=entry["NodeID"],
            name=entry["NodeManagerHostname"],
            cpus=resources.get("CPU", 0),
            gpus=resources.get("GPU", 0),
            accelerators=frozenset(accelerator for _, found, accelerator in marks if found),
            labels=entry.get("Labels") or {},
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Need:
    """The resources that one replica reserves, and the nodes that it may run on."""

    cpus: int | None
    """None: all cores of its node."""
    gpus: float = 0.0
    accelerator: str | None = None
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Ray's label selector."""
    spread: Spread | None = None
    """How a replica's weights are spread, if one device does not hold them all."""

    @classmethod
    def of(cls, launch: LaunchConfig, device: Literal["cpu", "cuda"]) -> Need:
        """The resources that `launch` reserves for a replica on this kind of device.

        Raises:
            ValueError: `--offload` asks for a place that the device does not have.
        """
        on_gpus = device == "cuda"
        return cls(
            cpus=launch.cpus_per_replica or (1 if on_gpus else None),
            gpus=launch.gpus_per_replica if on_gpus else 0.0,
            accelerator=launch.accelerator_type,
            labels=launch.labels(),
            spread=launch.spread(device),
        )

    def admits(self, node: Node) -> bool:
        """Whether a node has the accelerator and the labels."""
        right_kind = self.accelerator is None or self.accelerator in node.accelerators
        return right_kind and all(_matches(node.labels.get(key), value) for key, value in self.labels.items())

    def cpus_on(self, node: Node) -> int:
        """Cores that a replica reserves on a node."""
        return int(node.cpus) if self.cpus is None else self.cpus

    def slots(self, node: Node) -> int:
        """Number of replicas that fit on a node that nobody else uses."""
        cpus = self.cpus_on(node)
        if cpus < 1 or not self.admits(node):
            return 0
        room = node.cpus / cpus
        return int((min(room, node.gpus / self.gpus) if self.gpus else room) + _ROUNDING)

    def room(self, nodes: Iterable[Node]) -> int:
        """Number of replicas that fit on all nodes."""
        return sum(map(self.slots, nodes))

    def elsewhere(self, nodes: Iterable[Node]) -> int | None:
        """Cores to ask for on a node to come: those of the smallest present node; None if there is none."""
        sizes = [self.cpus_on(node) for node in nodes if self.slots(node)]
        return self.cpus or min(sizes, default=None)

    def __str__(self) -> str:
        """The resources in words."""
        words = ["all CPUs of a node" if self.cpus is None else f"{self.cpus} CPUs"]
        if self.gpus:
            words.append(f"{self.gpus:g} GPUs")
        if self.accelerator:
            words.append(f"an accelerator {self.accelerator}")
        words += [f"the label {key}={value}" for key, value in self.labels.items()]
        return ", ".join(words[:-1]) + " and " + words[-1] if words[1:] else words[0]


def _matches(label: str | None, wanted: str) -> bool:
    """Whether a node's label satisfies one condition of a label selector, as Ray reads it.

    Conditions are `a`, `!a`, `in(a, b)` and `!in(a, b)`; a node without the label satisfies the negative ones.
    """
    negative, positive = wanted.startswith("!"), wanted.removeprefix("!")
    if positive.startswith("in(") and positive.endswith(")"):
        values = [value.strip() for value in positive[3:-1].split(",")]
    else:
        values = [positive]
    return (label in values) != negative


def require_room(need: Need, nodes: Iterable[Node], least: int) -> None:
    """Refuses a cluster that holds fewer than `least` replicas.

    Raises:
        ValueError: the cluster holds fewer (the message lists its nodes), or the size of nodes to come is unknown.
    """
    nodes = list(nodes)
    room = need.room(nodes)
    if not room and not least and need.cpus is None:
        raise ValueError("--cpus-per-replica is needed to ask for nodes: none is there whose cores could be counted")
    if room < least:
        have = "; ".join(f"{n.name} {n.cpus:g} CPUs, {n.gpus:g} GPUs" for n in nodes[:8]) or "none is there"
        want = "no node has room for a replica" if not room else f"the nodes hold {room} of {least} replicas"
        others = f" and {len(nodes) - 8} more" if nodes[8:] else ""
        raise ValueError(f"{want} with {need} (nodes: {have}{others})")
