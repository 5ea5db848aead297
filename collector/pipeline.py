"""Work in stages: each has a thread of its own, so that the stages of several pieces overlap.

A replica reads and tokenizes the next shard while its device computes this one, and encodes and publishes
the one before meanwhile.

Guarantees:

- a stage works on one piece at a time, in the order in which they were handed in, always in one thread;
- at most so many pieces are in work as the pipeline has room for: whoever hands in another one waits;
- an exception belongs to the piece that raised it; the others go on.

Knows neither torch nor models; what the stages do is told by whoever builds the pipeline.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections import defaultdict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

IN_WORK = 3
"""Shards that a replica has in work at once: one being read, one on the device, one being written."""


class DeviceLost(RuntimeError):  # noqa: N818 - what happened, in the words of the log
    """The device computes nothing more for this process, so the replica is of no use for any other shard."""


class Stopwatch:
    """Wall time by stage, and when it began to count."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Adds the time spent in the context to `stage`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - started


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One step that every piece takes."""

    name: str
    """Of its thread."""
    step: Callable[[Any], Any]
    """Takes what the stage before returned, the first one the piece itself."""
    prepare: Callable[[], None] | None = None
    """Called in the stage's thread before its first piece."""


class Pipeline:
    """Runs pieces through stages. Threads start with the first piece and end with `close`."""

    def __init__(self, *stages: Stage, room: int = IN_WORK) -> None:
        """Prepares the threads.

        Args:
            stages: in the order that a piece takes.
            room: how many pieces may be in work at once.
        """
        self.room = room
        self._steps = [stage.step for stage in stages]
        self._threads = [
            ThreadPoolExecutor(max_workers=1, thread_name_prefix=stage.name, initializer=stage.prepare)
            for stage in stages
        ]
        self._by_name = {stage.name: thread for stage, thread in zip(stages, self._threads, strict=True)}
        self._free = threading.Semaphore(room)
        self._closed = False

    def submit(self, piece: Any) -> Future[Any]:
        """Hands in a piece, once there is room for it; may be called from any thread.

        Returns:
            What the last stage returns, or the exception of the stage that failed.
        """
        self._free.acquire()
        result: Future[Any] = Future()
        result.add_done_callback(lambda _: self._free.release())
        self._hand_on(0, piece, result)
        return result

    def call(self, stage: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function in a stage's thread, between two pieces, and waits for what it returns."""
        return self._by_name[stage].submit(function, *arguments).result()

    def map(self, pieces: Iterable[Any]) -> Iterator[Any]:
        """The results of all pieces, in order; the first exception is raised where its result would be."""
        waiting: deque[Future[Any]] = deque()
        for piece in pieces:
            if len(waiting) == self.room:
                yield waiting.popleft().result()
            waiting.append(self.submit(piece))
        while waiting:
            yield waiting.popleft().result()

    def close(self) -> None:
        """Ends the threads once the steps that they are at are done; pieces still in work fail."""
        self._closed = True
        for thread in self._threads:  # in this order, for a stage hands on to the next one
            thread.shutdown()

    def _hand_on(self, number: int, piece: Any, result: Future[Any]) -> None:
        if number == len(self._steps):
            result.set_result(piece)
            return
        try:
            self._threads[number].submit(self._run, number, [(piece, result)])
        except RuntimeError as error:  # its thread has been ended
            result.set_exception(error)

    def _run(self, number: int, job: list[tuple[Any, Future[Any]]]) -> None:
        piece, result = job.pop()
        try:
            if self._closed:
                raise RuntimeError("closed before the work was done")
            piece = self._steps[number](piece)
        except BaseException as error:  # noqa: BLE001 - for whoever waits for the piece
            result.set_exception(error)
            # The traceback holds this frame and those below: a result in them would keep itself and the piece.
            del piece, result
        else:
            self._hand_on(number + 1, piece, result)
