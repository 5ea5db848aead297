"""The forward passes of a shard: batches in, the routing of every token out.

While the device computes a batch, the host puts the batch before it in place. Every array starts as
"never written", so that a lost token is found when the arrays are checked. A batch that does not fit into
the GPU's memory is halved until it does; padding is always on the right.

All passes of a replica belong into one thread: inference mode and torch's number of threads are a thread's
own. What a router decides is read by `capture`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch

from collector.capture import batches
from collector.store import tables
from collector.store.tables import LayerRouting

if TYPE_CHECKING:
    from collector.capture.hooks import Decisions, RouterCapture
    from collector.config import CaptureConfig
    from collector.store.tables import Layer


@dataclasses.dataclass(kw_only=True)
class Passes:
    """What the forward passes of a shard took."""

    batches: int = 0
    padded_tokens: int = 0
    halved: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardPasses:
    """Runs all documents of a shard through a model whose routers are captured."""

    capture: RouterCapture
    """Inside its context."""
    layers: list[Layer]
    """The captured routers, in the capture's order."""
    pad_id: int
    config: CaptureConfig
    """With `tokens_per_batch` resolved."""

    def run(self, tokens: dict[str, batches.TokenTable]) -> tuple[list[LayerRouting], Passes]:
        """The routing by router, not checked yet, and what it took.

        Args:
            tokens: stack -> the tokens that it is given; the same documents in each.

        Raises:
            torch.OutOfMemoryError: a single document does not fit into the device's memory.
            RuntimeError: a router did not fire exactly once.
        """
        routing = self._unwritten(tokens)
        passes = Passes()
        waiting: tuple[dict[str, batches.Batch], Decisions] | None = None
        todo = self._packed(tokens)[::-1]
        while todo:
            documents = todo.pop()
            batch = {stack: batches.pad(table, documents, self.pad_id) for stack, table in tokens.items()}
            decisions = self._pass(batch)
            if decisions is None:
                middle = (len(documents) + 1) // 2
                todo += [documents[middle:], documents[:middle]]
                passes.halved += 1
                continue
            if waiting is not None:
                _put_in_place(routing, *waiting)
            waiting = batch, decisions
            passes.batches += 1
            passes.padded_tokens += sum(grid.input_ids.size for grid in batch.values())
        if waiting is not None:
            _put_in_place(routing, *waiting)
        return routing, passes

    def _unwritten(self, tokens: dict[str, batches.TokenTable]) -> list[LayerRouting]:
        dtype = tables.expert_dtype(self.layers)
        probabilities = "probabilities" in self.config.store
        return [
            LayerRouting.unwritten(layer, len(tokens[layer.token_stack].ids), dtype, probabilities=probabilities)
            for layer in self.layers
        ]

    def _packed(self, tokens: dict[str, batches.TokenTable]) -> list[np.ndarray]:
        """Documents by batch."""
        assert self.config.tokens_per_batch is not None, "resolved before a replica exists"
        lengths = np.stack([table.lengths for table in tokens.values()], axis=1)
        return batches.pack(lengths, self.config.tokens_per_batch) if lengths.any() else []

    def _pass(self, batch: dict[str, batches.Batch]) -> Decisions | None:
        """One forward pass; None if it does not fit into the GPU's memory, but a part of it may.

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
        # Only here is the failed pass gone, with the tensors that its traceback held.
        torch.cuda.empty_cache()
        return None


def _put_in_place(routing: list[LayerRouting], batch: dict[str, batches.Batch], decisions: Decisions) -> None:
    """Writes a batch's decisions to the slots of its tokens."""
    for layer, decision in zip(routing, decisions.wait(), strict=True):
        slots = batch[layer.geometry.token_stack].slots
        layer.experts_tk[slots] = decision.experts_tk.numpy()
        layer.weights_tk[slots] = decision.weights_tk.float().numpy()
        for name, values in zip(tables.STATISTICS, decision.statistics_3t.numpy(), strict=True):
            layer.statistics[name][slots] = values
        if layer.dropped_tk is not None and decision.dropped_tk is not None:
            layer.dropped_tk[slots] = decision.dropped_tk.numpy()
        if layer.probabilities_te is not None and decision.probabilities_te is not None:
            layer.probabilities_te[slots] = decision.probabilities_te.numpy()
