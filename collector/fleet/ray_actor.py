"""The replica as a Ray actor, and how one is started on a node."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from collector.pipeline import IN_WORK

if TYPE_CHECKING:
    from collector.config import RunConfig, Spread
    from collector.data.plan import Shard
    from collector.fleet.placement import Need
    from collector.store.run_directory import Commit


class Actor:
    """Base class of the actors: says where it is."""

    def where(self) -> tuple[str, str]:
        """Node id and name of the machine; answered as soon as the actor has a place."""
        import platform

        return ray.get_runtime_context().get_node_id(), platform.node()


class ReplicaActor(Actor):
    """A replica in an actor. Loading is a call of its own, so that its errors arrive as they are."""

    def load(
        self, root: str, config: RunConfig, plan_hash: str, threads: int | None, spread: Spread | None
    ) -> dict[str, Any]:
        """Loads the replica; returns its card for run.json."""
        from collector.replica.replica import Replica

        self.replica = Replica(root, config, plan_hash, threads=threads, spread=spread)
        self.replica.write_vocabulary()
        return self.replica.card()

    def collect(self, shard: Shard) -> Commit:
        """Collects one shard; several may be in work at once."""
        return self.replica.collect(shard)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplicaSpec:
    """The settings with which every replica of a run is started."""

    root: str
    """The run directory."""
    config: RunConfig
    plan_hash: str
    need: Need
    """The resources that a replica reserves."""
    actor_class: type[Actor] = ReplicaActor

    def start(self, node: str | None, cpus: int) -> Any:
        """Starts an actor, which waits for its place.

        Args:
            node: id of its node. None lets Ray choose, and an autoscaler add a node for it.
            cpus: cores that it reserves.
        """
        options: dict[str, Any] = {
            "num_cpus": cpus, "num_gpus": self.need.gpus, "max_concurrency": IN_WORK, "max_restarts": 0,
            "max_task_retries": 0,
        }  # fmt: skip
        if node is not None:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
        else:
            options |= {"accelerator_type": self.need.accelerator, "label_selector": dict(self.need.labels) or None}
        remote: Any = ray.remote(self.actor_class)
        return remote.options(**{key: value for key, value in options.items() if value is not None}).remote()

    def load(self, actor: Any, cpus: int) -> Any:
        """Has an actor load the model; returns the reference to its card."""
        threads = cpus if self.config.device == "cpu" else None
        return actor.load.remote(self.root, self.config, self.plan_hash, threads, self.need.spread)
