"""Runs the forward passes of a shard, and puts the results of every token in place.

All passes of a replica belong in one thread, because inference mode and torch's number of threads are set per
thread. Beside a GPU that thread only starts passes: another one waits for their results and puts them in place, so that
the GPU goes from batch to batch, and from shard to shard, without waiting for the host. Every array starts as
"never written", so that checking the arrays finds a lost token. A batch that does not fit into
the GPU's memory is halved until it does. Padding is always on the right. `hooks` runs a single pass.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch

from collector.capture import batches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from collector.capture.hooks import Capture, Captured
    from collector.capture.recorder import Recorder, Recording
    from collector.config import CaptureConfig

Result = TypeVar("Result")

AHEAD = 2
"""Batches whose results may wait for their place while the device computes the next one."""


@dataclasses.dataclass(kw_only=True)
class Passes:
    """Counts of a shard's forward passes."""

    batches: int = 0
    padded_tokens: int = 0
    halved: int = 0


class Results(Protocol):
    """What the recorders kept of one pass, perhaps still on its way."""

    def wait(self) -> list[list[Any]]:
        """Blocks until it is there; by recorder, what each of its hooks kept."""

    def release(self) -> None:
        """Says that it has been read."""


class Here(Executor):
    """Does what is submitted at once, in the calling thread."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        """Returns a future that is done; an error is raised where its result is asked for."""
        done: Future[Any] = Future()
        try:
            done.set_result(function(*arguments, **named))
        except Exception as error:  # noqa: BLE001 - raised where the result is awaited
            done.set_exception(error)
        return done


class Placing:
    """Waits for the results of a shard's batches, and puts them in place, in the order of the batches."""

    def __init__(self, thread: Executor, recorders: Sequence[Recorder], tokens: dict[str, batches.TokenTable]) -> None:
        """Makes room for the shard, in the thread that does all this."""
        self.seconds = 0.0
        """Time that the thread has worked, apart from waiting for the device."""
        self._thread = thread
        self._waiting: deque[Future[None]] = deque()
        self._recordings: list[Recording] = []
        self._waiting.append(thread.submit(self._start, recorders, tokens))

    def _start(self, recorders: Sequence[Recorder], tokens: dict[str, batches.TokenTable]) -> None:
        started = time.perf_counter()
        self._recordings = [recorder.start(tokens) for recorder in recorders]
        self.seconds += time.perf_counter() - started

    def _put(self, batch: dict[str, batches.Batch], captured: Results) -> None:
        results = captured.wait()
        started = time.perf_counter()
        for recording, kept in zip(self._recordings, results, strict=True):
            recording.put(batch, kept)
        captured.release()
        self.seconds += time.perf_counter() - started

    def add(self, batch: dict[str, batches.Batch], captured: Results) -> None:
        """Hands over a batch; waits while there are more than `AHEAD`."""
        self._waiting.append(self._thread.submit(self._put, batch, captured))
        while len(self._waiting) > AHEAD:
            self._waiting.popleft().result()

    def conclude(self, results: Sequence[Any]) -> None:
        """Hands over what the recorders computed after the last batch."""

        def hand_over() -> None:
            for recording, result in zip(self._recordings, results, strict=True):
                recording.conclude(result)

        self._waiting.append(self._thread.submit(hand_over))

    def finish(self) -> list[Recording]:
        """Waits until every batch is in place, and returns each recorder's recording, not checked yet.

        Raises:
            torch.AcceleratorError: the device failed.
        """
        while self._waiting:
            self._waiting.popleft().result()
        return self._recordings


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardPasses:
    """Runs all documents of a shard through a model."""

    capture: Capture
    """Inside its context."""
    pad_id: int
    config: CaptureConfig
    """With `tokens_per_batch` resolved."""
    placer: Executor = dataclasses.field(default_factory=Here)
    """Where results are put in place."""

    def run(self, tokens: dict[str, batches.TokenTable]) -> tuple[list[Recording], Passes]:
        """Runs all documents, and returns each recorder's recording, not checked yet, with the counts.

        Args:
            tokens: stack -> the tokens that it is given; the same documents in each.

        Raises:
            torch.OutOfMemoryError: a single document does not fit into the device's memory.
            RuntimeError: a hook did not fire exactly once.
        """
        placing, passes = self.start(tokens)
        return placing.finish(), passes

    def start(self, tokens: dict[str, batches.TokenTable]) -> tuple[Placing, Passes]:
        """Like `run`, but returns when the last pass has been started; the results are being put in place."""
        placing, passes = Placing(self.placer, self.capture.recorders, tokens), Passes()
        self.capture.begin(tokens)
        results = in_halves(
            self._packed(tokens), lambda documents: self._pass(tokens, documents), passes,
            lambda document: " + ".join(str(table.lengths[document]) for table in tokens.values()) + " tokens",
            f"a lower --max-length (now {self.config.max_length})",
        )  # fmt: skip
        for batch, captured in results:
            placing.add(batch, captured)
            passes.batches += 1
            passes.padded_tokens += sum(grid.input_ids.size for grid in batch.values())
        placing.conclude(self.capture.conclude())
        return placing, passes

    def _packed(self, tokens: dict[str, batches.TokenTable]) -> list[np.ndarray]:
        """The documents of each batch."""
        assert self.config.tokens_per_batch is not None, "resolved before a replica exists"
        lengths = np.stack([table.lengths for table in tokens.values()], axis=1)
        return batches.pack(lengths, self.config.tokens_per_batch)

    def _pass(
        self, tokens: dict[str, batches.TokenTable], documents: NDArray[np.int64]
    ) -> tuple[dict[str, batches.Batch], Captured]:
        """One forward pass of some documents."""
        batch = {stack: batches.pad(table, documents, self.pad_id) for stack, table in tokens.items()}
        grids = [torch.from_numpy(part) for grid in batch.values() for part in (grid.input_ids, grid.attention_mask)]
        return batch, self.capture.run(*grids, slots={stack: each.slots for stack, each in batch.items()})


def in_halves(
    packed: Sequence[NDArray[np.int64]], run: Callable[[NDArray[np.int64]], Result], passes: Passes,
    size: Callable[[int], str], remedy: str,
) -> Iterator[Result]:  # fmt: skip
    """Yields the results of batches; one that does not fit into the GPU's memory runs in halves.

    Args:
        packed: the documents of each batch.
        run: runs some documents.
        passes: counts the halved batches.
        size: tells how large a document is.
        remedy: what makes documents shorter.

    Raises:
        torch.OutOfMemoryError: a single document does not fit.
    """
    todo = list(packed)[::-1]
    while todo:
        documents = todo.pop()
        try:
            result = run(documents)
        except torch.OutOfMemoryError as error:
            if len(documents) == 1:
                raise torch.OutOfMemoryError(
                    f"a single document of {size(int(documents[0]))} does not fit into the device's memory: cut "
                    f"documents with {remedy}; a lower --tokens-per-batch makes batches smaller, but none is smaller "
                    f"than a document. {error}"
                ) from error
        else:
            yield result
            continue
        # Here, after the handler, the traceback no longer holds the tensors of the failed pass.
        torch.cuda.empty_cache()
        middle = (len(documents) + 1) // 2
        todo += [documents[middle:], documents[:middle]]
        passes.halved += 1
