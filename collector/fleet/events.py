"""The interface between dispatcher and fleet: the calls that a fleet takes, and the events that it reports.

Replicas and shards are known by numbers. A run's fleet is `ray_fleet.RayFleet`; tests use fleets of their own.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable

    from collector.data.plan import Shard
    from collector.store.run_directory import Commit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A replica is ready."""

    replica: int
    card: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NotLoaded:
    """A replica did not become ready and is gone."""

    replica: int
    error: BaseException
    refused: bool
    """True if loading raised an error, which every replica would raise; False if the replica died."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collected:
    """A shard is committed."""

    replica: int
    shard: int
    commit: Commit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failed:
    """A shard raised an error; its replica goes on."""

    replica: int
    shard: int
    error: BaseException
    trace: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Died:
    """A replica died, with everything that it had in work."""

    replica: int
    error: BaseException
    trace: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Notice:
    """Something that people should know, for example that replicas wait for machines."""

    message: str
    event: str


Event = Loaded | NotLoaded | Collected | Failed | Died | Notice


class Fleet(Protocol):
    """Replicas that come and go, each known by a number."""

    def scale(self, waiting: int) -> None:
        """Asks for as many replicas as `waiting` shards can use, and gives up those without work."""

    def wait(self, timeout: float) -> Iterable[Event]:
        """The events since the last call, after at most `timeout` seconds."""

    def assign(self, replica: int, shard: Shard) -> None:
        """Gives a replica a shard."""

    def release(self, replica: int) -> None:
        """Ends a replica that has nothing to do."""

    def node(self, replica: int) -> str:
        """The name of the machine that a replica runs or ran on."""

    def count(self, state: str) -> int:
        """Replicas that are `requested`, `loading` or `ready`."""

    def stop(self) -> None:
        """Ends all replicas at once; shards that they did not commit do not count."""
