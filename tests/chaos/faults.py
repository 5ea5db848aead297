"""What goes wrong, where and when: a schedule in a folder that all processes of a run share.

A fault names a point of the commit protocol and the how-manieth visit to it, counted over all processes and
launches of the run. So a schedule made from a seed happens once, whichever process comes by, and is bounded
whatever the run does: a visit is counted by appending one byte to a file under a lock, and no two get the same number.
Every fault that happens leaves a mark before it does. Knows nothing of the collector: `seams` says where points are.

    board.schedule([Fault(point="commit.after", visit=7, action="kill")])   # the campaign, before a launch
    board.visit("commit.after")                                             # the process, at the point
    board.fired()                                                           # the campaign, afterwards
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable

Action = Literal["kill", "refuse", "full", "slow"]

PROTOCOL = (
    "read.before", "read.after", "forward.before", "forward.after", "write.before", "write.after",
    "publish.routing.before", "publish.routing.after", "publish.tokens.before", "publish.documents.before",
    "publish.documents.after", "fsync.before", "fsync.after", "rename.before", "rename.after",
    "commit.before", "link.before", "link.after", "commit.after", "answer.before",
)  # fmt: skip
"""Points on a shard's way through a replica, each visited by every shard at least once unless it died before."""
LAUNCH = ("plan.parquet.before", "plan.parquet.after", "run.json.before", "run.json.after", "_MANIFEST.parquet.before",
          "_MANIFEST.parquet.after", "_SUCCESS.before", "_SUCCESS.after")  # fmt: skip
"""Points that only the driver comes by."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that goes wrong."""

    point: str
    visit: int | None = None
    """At which visit, from 1; None: at every one."""
    action: Action = "kill"
    """SIGKILL, an input/output error, a full disk, or a pause. At a point `….after` the work is done already, so an
    error there is an answer that came too late."""
    shard: int | None = None
    """Only where this shard is at work; None: any."""
    seconds: float = 0.0
    """Of a pause."""


class Board:
    """The folder: schedule, counters, marks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("visits", "fired", "workers"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self._faults: list[Fault] | None = None

    def schedule(self, faults: Iterable[Fault]) -> None:
        """Replaces the schedule, for processes that start from now on."""
        self._faults = list(faults)
        text = json.dumps([dataclasses.asdict(fault) for fault in self._faults], indent=1)
        (self.folder / "schedule.json").write_text(text)

    @property
    def faults(self) -> list[Fault]:
        """The schedule, read once per process."""
        if self._faults is None:
            with contextlib.suppress(FileNotFoundError):
                self._faults = [Fault(**fields) for fields in json.loads((self.folder / "schedule.json").read_bytes())]
        return self._faults or []

    def visit(self, point: str, shard: int | None = None) -> None:
        """Counts the visit and does what is scheduled for it.

        Raises:
            OSError: the store refuses, or the disk is full.
        """
        number = self._count(point)
        for fault in self.faults:
            if fault.point == point and fault.visit in (None, number) and fault.shard in (None, shard):
                self._happen(fault, number)

    def _count(self, point: str) -> int:
        with (self.folder / "visits" / point).open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(b".")
            file.flush()
            return os.fstat(file.fileno()).st_size

    def _happen(self, fault: Fault, number: int) -> None:
        if fault.visit is None and fault.action == "slow":  # sets the pace of a run
            time.sleep(fault.seconds)
            return
        (self.folder / "fired" / f"{fault.action} {fault.point} {number}").touch()
        match fault.action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "slow":
                time.sleep(fault.seconds)
            case "full":
                raise OSError(errno.ENOSPC, f"no space left on device (at {fault.point})")
            case "refuse":
                raise OSError(errno.EIO, f"the store does not answer (at {fault.point})")

    def enter(self) -> None:
        """Says that this process is a replica, for those who kill from outside."""
        (self.folder / "workers" / str(os.getpid())).touch()

    def workers(self) -> list[int]:
        """Process ids of all replicas that there ever were."""
        return [int(path.name) for path in (self.folder / "workers").iterdir()]

    def fired(self) -> Counter[tuple[str, str]]:
        """(action, point) -> how often it happened."""
        marks = (path.name.split(" ") for path in (self.folder / "fired").iterdir())
        return Counter((action, point) for action, point, _ in marks)

    def unfired(self) -> list[Fault]:
        """What was scheduled for a visit that never came."""
        marks = {path.name for path in (self.folder / "fired").iterdir()}
        return [fault for fault in self.faults
                if fault.visit is not None and f"{fault.action} {fault.point} {fault.visit}" not in marks]  # fmt: skip


def draw(rng: random.Random, count: int, *, points: Iterable[str], visits: int, actions: Iterable[str] = ("kill",),
         seconds: float = 0.0) -> list[Fault]:  # fmt: skip
    """Draws `count` faults: points in turns, so that none is left out, visits up to `visits`, never two at one."""
    points, actions = rng.sample(list(points), len(list(points))), list(actions)
    assert count <= len(points) * visits, f"{count} faults do not fit into {visits} visits of {len(points)} points"
    taken: set[tuple[str, int]] = set()
    while len(taken) < count:
        place = points[len(taken) % len(points)], rng.randint(1, visits)
        taken.add(place)
    return [
        Fault(point=point, visit=visit, action=rng.choice(actions), seconds=seconds) for point, visit in sorted(taken)
    ]
