"""Keeps the state of each shard of a run: waiting, in work, committed or left out.

It holds a few bytes per shard and no objects, so a plan of a million shards takes a few megabytes. The dispatcher takes
the next shard from it. Shards that may have killed their replica are taken separately, because they have to run alone.
"""

from __future__ import annotations

import enum
import random
from array import array
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class State(enum.IntEnum):
    """The state of a shard."""

    WAITING = 0
    WORKING = 1
    COMMITTED = 2
    FAILED = 3


class Worklist:
    """The shards 0 … N - 1, each in one state."""

    def __init__(
        self, shards: int, *, committed: Iterable[int] = (), failed: Iterable[int] = (), share: tuple[int, int] = (0, 1)
    ) -> None:
        """Queues every shard that is neither committed nor failed.

        Args:
            shards: N.
            committed: shards that are done.
            failed: shards that are left out.
            share: this driver begins with the shards of this remainder (first) modulo this divisor (second).
        """
        self.share = share
        self._state = bytearray(shards)
        self._counts = [shards, 0, 0, 0]
        for state, numbers in ((State.COMMITTED, committed), (State.FAILED, failed)):
            for number in numbers:
                self._set(number, state)
        self._line = array("I", _in_order([n for n in range(shards) if not self._state[n]], share)[::-1])
        self._again: deque[int] = deque()
        self._suspects: deque[int] = deque()

    def count(self, state: State) -> int:
        """How many shards are in `state`."""
        return self._counts[state]

    @property
    def waiting(self) -> int:
        """Number of shards that wait, suspects included."""
        return self._counts[State.WAITING]

    @property
    def unfinished(self) -> bool:
        """Whether a shard waits or is in work."""
        return bool(self._counts[State.WAITING] or self._counts[State.WORKING])

    @property
    def suspects(self) -> int:
        """Number of shards that wait to be tried alone."""
        return len(self._suspects)

    def is_own(self, number: int) -> bool:
        """Whether the shard is in this driver's own share."""
        remainder, parts = self.share
        return number % parts == remainder

    def take(self) -> int | None:
        """Takes the next shard of the queue; shards that failed before come last."""
        while self._line or self._again:
            number = self._line.pop() if self._line else self._again.popleft()
            if self._state[number] == State.WAITING:
                self._set(number, State.WORKING)
                return number
        return None

    def take_suspect(self) -> int | None:
        """Takes the next shard that has to run alone."""
        while self._suspects:
            number = self._suspects.popleft()
            if self._state[number] == State.WAITING:
                self._set(number, State.WORKING)
                return number
        return None

    def shuffle(self) -> None:
        """Shuffles the rest of the queue, differently in each driver."""
        random.Random().shuffle(self._line)

    def put_back(self, number: int, *, suspect: bool = False) -> None:
        """Queues a shard again; `suspect`: it has to run alone."""
        self._set(number, State.WAITING)
        (self._suspects if suspect else self._again).append(number)

    def commit(self, number: int) -> None:
        """Marks a shard as committed."""
        self._set(number, State.COMMITTED)

    def leave_out(self, number: int) -> None:
        """Marks a shard as left out."""
        self._set(number, State.FAILED)

    def found(self, committed: Iterable[int]) -> list[int]:
        """Removes shards from the queue that others have committed; returns those that were not known."""
        news = [number for number in committed if self._state[number] == State.WAITING]
        for number in news:
            self._set(number, State.COMMITTED)
        return news

    def _set(self, number: int, state: State) -> None:
        self._counts[self._state[number]] -= 1
        self._counts[state] += 1
        self._state[number] = state


def _in_order(numbers: list[int], share: tuple[int, int]) -> list[int]:
    """This driver's own shards first, then everybody else's.

    The others' shards are shuffled, differently in each driver; in one order, all helpers would take the same
    shard at the same time, again and again.
    """
    remainder, parts = share
    own = [number for number in numbers if number % parts == remainder]
    others = [number for number in numbers if number % parts != remainder]
    random.Random(remainder).shuffle(others)
    return own + others
