"""The replicas of a run on a Ray cluster: one actor each, as many as have room and work.

Ray retries and restarts nothing (`max_restarts=0`): the fleet reports every death, and the dispatcher decides. Only
commit records cross Ray's object store; parts go from the replica to the run directory.

A replica is pinned to a node and takes the resources that fit this node, so nodes may differ. Replicas beyond the
present nodes, which `--replicas N` or `MIN:MAX` asks for, wait unpinned; an autoscaler adds nodes for them. Every few
seconds the fleet looks at the nodes: new ones get replicas, and replicas of lost nodes are replaced. Loading has no
time limit. Every actor answers a first call at once, which tells an actor that loads from one that waits for a place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

import ray
from ray.exceptions import ActorUnschedulableError, RayError, RayTaskError

from collector.fleet.events import Collected, Died, Failed, Loaded, Notice, NotLoaded
from collector.fleet.ray_cluster import alive_nodes
from collector.pipeline import DeviceLost

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from collector.data.plan import Shard
    from collector.fleet.events import Event
    from collector.fleet.placement import Need, Node
    from collector.fleet.ray_actor import ReplicaSpec

NODES_EVERY = 3.0
"""Seconds between two looks at the cluster's nodes."""
PATIENCE = 30.0
"""Seconds that replicas wait for a place before a message says so."""
REMIND_EVERY = 600.0


@dataclasses.dataclass(kw_only=True)
class _Member:
    """A replica that was asked for."""

    actor: Any
    state: Literal["requested", "loading", "ready"] = "requested"
    node: str | None
    """Id of its node; None while it has none."""
    name: str
    since: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """A call that an actor has not answered yet."""

    replica: int
    method: Literal["where", "load", "collect"]
    shard: int = -1


class RayFleet:
    """Replicas on the nodes of the connected Ray; see `events.Fleet`."""

    def __init__(
        self, replica: ReplicaSpec, *, most: int | None = None, grows: bool = False, load_attempts: int = 3
    ) -> None:
        """Starts nothing yet.

        Args:
            replica: the settings of each replica.
            most: how many replicas there may be (None: as many as the nodes hold).
            grows: whether the cluster may get more nodes.
            load_attempts: a node on which this many replicas could not load gets no other.
        """
        self.spec = replica
        self.need = replica.need
        self.most = most
        self.grows = grows
        self.load_attempts = load_attempts
        self._numbers = itertools.count()
        self._members: dict[int, _Member] = {}
        self._names: dict[int, str] = {}
        self._calls: dict[Any, _Call] = {}
        self._refusals: Counter[str | None] = Counter()
        self._next_look = 0.0
        self._reminder = _Reminder(self.need)

    # -- size --------------------------------------------------------------------------------------

    def count(self, state: str) -> int:
        """See `Fleet.count`."""
        return sum(member.state == state for member in self._members.values())

    def node(self, replica: int) -> str:
        """See `Fleet.node`."""
        return self._names.get(replica, "a node unknown")

    def scale(self, waiting: int) -> None:
        """See `Fleet.scale`; looks at the nodes every few seconds, and at once when a replica was lost."""
        self._give_up(len(self._members) - self.count("ready") - waiting)
        if not waiting or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + NODES_EVERY
        nodes = [node for node in alive_nodes() if self._refusals[node.id] < self.load_attempts]
        self._give_up_without_node({node.id for node in nodes})
        wanted = waiting - (len(self._members) - self.count("ready"))
        if self.most is not None:
            wanted = min(wanted, self.most - len(self._members))
        # Those without a node will take places as well.
        places = self._free_places(nodes)
        places = places[: max(0, len(places) - self._unplaced())][: max(0, wanted)]
        for node in places:
            self._start(node.name, node.id, self.need.cpus_on(node))
        cpus = self.need.elsewhere(nodes)
        if self.grows and self.most is not None and cpus and self._refusals[None] < self.load_attempts:
            for _ in range(wanted - len(places)):
                self._start("a node to come", None, cpus)

    def _unplaced(self) -> int:
        return sum(member.node is None for member in self._members.values())

    def _free_places(self, nodes: list[Node]) -> list[Node]:
        """One entry per free place, the emptiest nodes first."""
        taken = Counter(member.node for member in self._members.values())
        places = [(number, node.id, node) for node in nodes for number in range(taken[node.id], self.need.slots(node))]
        return [node for _, _, node in sorted(places, key=lambda place: place[:2])]

    def _start(self, name: str, node: str | None, cpus: int) -> None:
        actor = self.spec.start(node, cpus)
        replica = next(self._numbers)
        self._members[replica] = _Member(actor=actor, node=node, name=name, since=time.monotonic())
        self._names[replica] = name
        self._calls[actor.where.remote()] = _Call(replica=replica, method="where")
        self._calls[self.spec.load(actor, cpus)] = _Call(replica=replica, method="load")

    def _give_up(self, surplus: int) -> None:
        """Ends surplus replicas that are not ready, first those that still wait for a place."""
        unready = [replica for replica, member in self._members.items() if member.state != "ready"]
        unready.sort(key=lambda replica: (self._members[replica].state != "requested", -replica))
        for replica in unready[: max(0, surplus)]:
            self.release(replica)

    def _give_up_without_node(self, alive: set[str]) -> None:
        """Ends replicas that wait for a place on a node that is gone."""
        for replica, member in list(self._members.items()):
            if member.state == "requested" and member.node is not None and member.node not in alive:
                self.release(replica)

    # -- work --------------------------------------------------------------------------------------

    def assign(self, replica: int, shard: Shard) -> None:
        """See `Fleet.assign`."""
        reference = self._members[replica].actor.collect.remote(shard)
        self._calls[reference] = _Call(replica=replica, method="collect", shard=shard.shard)

    def release(self, replica: int) -> None:
        """See `Fleet.release`."""
        member = self._members.pop(replica)
        for reference in [reference for reference, call in self._calls.items() if call.replica == replica]:
            del self._calls[reference]
        with contextlib.suppress(RayError):
            ray.kill(member.actor)

    def stop(self) -> None:
        """See `Fleet.stop`."""
        for replica in list(self._members):
            self.release(replica)

    def wait(self, timeout: float) -> Iterator[Event]:
        """See `Fleet.wait`."""
        yield from self._reminder.due(self._members.values())
        if not self._calls:
            time.sleep(timeout)
            return
        if ray.wait(list(self._calls), timeout=timeout)[0]:
            ready, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)
            for reference in ready:
                if reference in self._calls:  # else its replica is gone by now
                    yield from self._answered(self._calls.pop(reference), reference)

    def _answered(self, call: _Call, reference: Any) -> Iterator[Event]:
        member = self._members[call.replica]
        try:
            answer = ray.get(reference)
        except RayTaskError as error:
            yield from self._raised(call, error)
        except RayError as error:
            yield from self._lost(call, error)
        else:
            if call.method == "where":
                member.node, member.name = answer
                self._names[call.replica] = member.name
                if member.state == "requested":  # the two calls run at once, and a small model may be the first
                    member.state = "loading"
            elif call.method == "load":
                member.state = "ready"
                self._refusals[member.node] = 0
                yield Loaded(replica=call.replica, card=answer)
            else:
                yield Collected(replica=call.replica, shard=call.shard, commit=answer)

    def _raised(self, call: _Call, error: RayTaskError) -> Iterator[Event]:
        """The actor's own code raised an error."""
        if call.method != "collect":
            self._refuse(call.replica)
            yield NotLoaded(replica=call.replica, error=error.cause, refused=True)
        elif isinstance(error.cause, DeviceLost):
            self._remove(call.replica)
            yield Died(replica=call.replica, error=error.cause, trace=str(error))
        else:
            yield Failed(replica=call.replica, shard=call.shard, error=error.cause, trace=str(error))

    def _lost(self, call: _Call, error: RayError) -> Iterator[Event]:
        """The actor or its answer is lost; both are treated alike."""
        member = self._members[call.replica]
        if member.state == "ready":
            self._remove(call.replica)
            yield Died(replica=call.replica, error=error, trace=str(error))
        elif isinstance(error, ActorUnschedulableError) or self._is_gone(member.node):
            self._remove(call.replica)
            yield Notice(event="node_lost", message=f"{member.name} went away before its replica was ready")
        else:
            self._refuse(call.replica)
            yield NotLoaded(replica=call.replica, error=error, refused=False)

    def _is_gone(self, node: str | None) -> bool:
        return node is not None and node not in {each.id for each in alive_nodes()}

    def _refuse(self, replica: int) -> None:
        self._refusals[self._members[replica].node] += 1
        self._remove(replica)

    def _remove(self, replica: int) -> None:
        """Removes a lost replica; another one may take its place at once."""
        self.release(replica)
        self._next_look = 0.0


class _Reminder:
    """Reports from time to time that replicas wait for a place, or that none has room."""

    def __init__(self, need: Need) -> None:
        self._need = need
        self._next = 0.0
        self._members_since = time.monotonic()

    def due(self, members: Collection[_Member]) -> Iterator[Notice]:
        """Yields a notice if it is time for one."""
        now = time.monotonic()
        waiting = [member for member in members if member.state == "requested"]
        if members:
            self._members_since = now
        since = min((member.since for member in waiting), default=now) if members else self._members_since
        if now - since < PATIENCE or now < self._next:
            return
        self._next = now + REMIND_EVERY
        if not members:
            yield Notice(event="no_place", message=f"no node has room for a replica with {self._need}; waiting for one")
            return
        to_come = sum(member.node is None for member in members)
        reasons = [f"{len(waiting) - to_come} for what others use on their nodes"] if len(waiting) > to_come else []
        reasons += [f"{to_come} for nodes to come"] if to_come else []
        message = f"{len(waiting)} replicas wait for {self._need} each, {' and '.join(reasons)}"
        yield Notice(event="replicas_wait", message=message)
