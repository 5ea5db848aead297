"""Runs pieces of work through stages, one thread per stage, so that the stages of several pieces overlap.

A replica reads and tokenizes the next shard while its device computes the current one and the previous one
is encoded and published.

Guarantees:

- a stage works on one piece at a time, in the order of submission, always in the same thread;
- the number of pieces in work never exceeds the pipeline's room: submitting one more blocks;
- an exception affects only the piece that raised it; the others go on.

The module knows neither torch nor models: the caller supplies the function of each stage.
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

IN_WORK = 4
"""Shards that a replica processes at once: one is read, one is on the device, two are written."""


class DeviceLost(RuntimeError):  # noqa: N818 - what happened, in the words of the log
    """The device is unusable for the rest of this process, so the replica cannot process any other shard."""


class Stopwatch:
    """Measures wall time by stage; `started` is when it was created."""

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
    """One step that every piece goes through."""

    name: str
    """Name of the stage and prefix of its thread's name."""
    step: Callable[[Any], Any]
    """Takes the result of the previous stage; the first stage takes the piece itself."""
    prepare: Callable[[], None] | None = None
    """Called in the stage's thread before its first piece."""
    threads: int = 1
    """Pieces that may be in this stage at once."""


class Pipeline:
    """Runs pieces through stages. Threads start with the first piece and end with `close`."""

    def __init__(self, *stages: Stage, room: int = IN_WORK) -> None:
        """Prepares the threads.

        Args:
            stages: the stages in execution order.
            room: how many pieces may be in work at once.
        """
        self.room = room
        self._steps = [stage.step for stage in stages]
        self._threads = [
            ThreadPoolExecutor(max_workers=stage.threads, thread_name_prefix=stage.name, initializer=stage.prepare)
            for stage in stages
        ]
        self._by_name = {stage.name: thread for stage, thread in zip(stages, self._threads, strict=True)}
        self._free = threading.Semaphore(room)
        self._closed = False

    def submit(self, piece: Any) -> Future[Any]:
        """Submits a piece, blocking until there is room for it; may be called from any thread.

        Returns:
            A future with the result of the last stage, or with the exception of the stage that failed.
        """
        self._free.acquire()
        result: Future[Any] = Future()
        result.add_done_callback(lambda _: self._free.release())
        self._hand_on(0, piece, result)
        return result

    def call(self, stage: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function in a stage's thread, between two pieces, and returns its result."""
        return self._by_name[stage].submit(function, *arguments).result()

    def map(self, pieces: Iterable[Any]) -> Iterator[Any]:
        """Yields the results of all pieces in order; a failed piece raises its exception in its place."""
        waiting: deque[Future[Any]] = deque()
        for piece in pieces:
            if len(waiting) == self.room:
                yield waiting.popleft().result()
            waiting.append(self.submit(piece))
        while waiting:
            yield waiting.popleft().result()

    def close(self) -> None:
        """Ends the threads after their current steps; pieces still in work fail."""
        self._closed = True
        for thread in self._threads:  # in stage order, because each stage submits to the next
            thread.shutdown()

    def _hand_on(self, number: int, piece: Any, result: Future[Any]) -> None:
        if number == len(self._steps):
            result.set_result(piece)
            return
        try:
            self._threads[number].submit(self._run, number, [(piece, result)])
        except RuntimeError as error:  # the thread was shut down
            result.set_exception(error)

    def _run(self, number: int, job: list[tuple[Any, Future[Any]]]) -> None:
        piece, result = job.pop()
        try:
            if self._closed:
                raise RuntimeError("closed before the work was done")
            piece = self._steps[number](piece)
        except BaseException as error:  # noqa: BLE001 - raised where the result is awaited
            result.set_exception(error)
            # The traceback references this frame: if the frame kept `result` and `piece`, they would never be freed.
            del piece, result
        else:
            self._hand_on(number + 1, piece, result)
