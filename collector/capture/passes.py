"""Runs the forward passes of a shard, and puts the results of every token in place.

While the device computes a batch, the host stores the results of the batch before. Every array starts as
"never written", so that checking the arrays finds a lost token. A batch that does not fit into
the GPU's memory is halved until it does. Padding is always on the right.

All passes of a replica belong in one thread, because inference mode and torch's number of threads are set per
thread. `hooks` runs a single pass.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch

from collector.capture import batches

if TYPE_CHECKING:
    from collector.capture.hooks import Capture, Captured
    from collector.capture.recorder import Recording
    from collector.config import CaptureConfig


@dataclasses.dataclass(kw_only=True)
class Passes:
    """Counts of a shard's forward passes."""

    batches: int = 0
    padded_tokens: int = 0
    halved: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardPasses:
    """Runs all documents of a shard through a model."""

    capture: Capture
    """Inside its context."""
    pad_id: int
    config: CaptureConfig
    """With `tokens_per_batch` resolved."""

    def run(self, tokens: dict[str, batches.TokenTable]) -> tuple[list[Recording], Passes]:
        """Runs all documents, and returns each recorder's recording, not checked yet, with the counts.

        Args:
            tokens: stack -> the tokens that it is given; the same documents in each.

        Raises:
            torch.OutOfMemoryError: a single document does not fit into the device's memory.
            RuntimeError: a hook did not fire exactly once.
        """
        recordings = [recorder.start(tokens) for recorder in self.capture.recorders]
        passes = Passes()
        waiting: tuple[dict[str, batches.Batch], Captured] | None = None
        todo = self._packed(tokens)[::-1]
        while todo:
            documents = todo.pop()
            batch = {stack: batches.pad(table, documents, self.pad_id) for stack, table in tokens.items()}
            captured = self._pass(batch)
            if captured is None:
                middle = (len(documents) + 1) // 2
                todo += [documents[middle:], documents[:middle]]
                passes.halved += 1
                continue
            if waiting is not None:
                _put_in_place(recordings, *waiting)
            waiting = batch, captured
            passes.batches += 1
            passes.padded_tokens += sum(grid.input_ids.size for grid in batch.values())
        if waiting is not None:
            _put_in_place(recordings, *waiting)
        return recordings, passes

    def _packed(self, tokens: dict[str, batches.TokenTable]) -> list[np.ndarray]:
        """The documents of each batch."""
        assert self.config.tokens_per_batch is not None, "resolved before a replica exists"
        lengths = np.stack([table.lengths for table in tokens.values()], axis=1)
        return batches.pack(lengths, self.config.tokens_per_batch) if lengths.any() else []

    def _pass(self, batch: dict[str, batches.Batch]) -> Captured | None:
        """One forward pass; None if the batch does not fit into the GPU's memory, but a part of it may.

        Raises:
            torch.OutOfMemoryError: it is a single document that does not fit.
        """
        grids = [torch.from_numpy(part) for grid in batch.values() for part in (grid.input_ids, grid.attention_mask)]
        try:
            return self.capture.run(*grids)
        except torch.OutOfMemoryError as error:
            if len(grids[0]) == 1:
                tokens = " + ".join(str(grid.input_ids.size) for grid in batch.values())
                raise torch.OutOfMemoryError(
                    f"a single document of {tokens} tokens does not fit into the device's memory: cut documents with "
                    f"a lower --max-length (now {self.config.max_length}); a lower --tokens-per-batch makes "
                    f"batches smaller, but none is smaller than a document. {error}"
                ) from error
        # Here, after the handler, the traceback no longer holds the tensors of the failed pass.
        torch.cuda.empty_cache()
        return None


def _put_in_place(recordings: list[Recording], batch: dict[str, batches.Batch], captured: Captured) -> None:
    """Writes a batch's results to the slots of its tokens."""
    for recording, kept in zip(recordings, captured.wait(), strict=True):
        recording.put(batch, kept)
