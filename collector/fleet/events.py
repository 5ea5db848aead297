"""What a fleet of replicas is to the dispatcher: what can be asked of it, and what it tells.

Replicas are known by numbers, shards too. The fleet of a run is `fleet.RayFleet`; anything that
keeps this contract takes its place in a test.
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
    """Its model says why, so that another replica would say the same; else it died."""


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
    """A replica is gone, and with it whatever it had in work."""

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
        """Asks for replicas as there is work for, `waiting` shards, and gives up those that there is none for."""

    def wait(self, timeout: float) -> Iterable[Event]:
        """What happened, after at most `timeout` seconds."""

    def assign(self, replica: int, shard: Shard) -> None:
        """Gives a replica a shard."""

    def release(self, replica: int) -> None:
        """Ends a replica that has nothing to do."""

    def node(self, replica: int) -> str:
        """The name of the machine that a replica is or was on."""

    def count(self, state: str) -> int:
        """Replicas that are `requested`, `loading` or `ready`."""

    def stop(self) -> None:
        """Ends all replicas at once; what they did not commit does not count."""
