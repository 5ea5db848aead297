"""Records how surprised the model is by each token: the column `loss` of the table `tokens`.

The loss of a token is -ln p(token | those before it in its document), in nats, of the model's own head. The first token
of a document has none, and neither has a token of an encoder. The head runs over some tokens at a time, so that its
logits never take more than a fixed part of the memory.

Shapes: R real tokens, H hidden size, F tokens that follow another one of their document, V entries of the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa

from collector.capture.recorder import Hook, LastHidden, Recorder, Recording

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from numpy.typing import NDArray

    from collector.capture.batches import Batch, TokenTable
    from collector.capture.padding import Grid

COLUMN = "loss"


class _Losses(NamedTuple):
    """The losses of R tokens."""

    loss_r: torch.Tensor
    """[R] nats, NaN for the first token of a document."""


class LossRecorder(Recorder):
    """Keeps the loss of every token of the decoder."""

    tables: ClassVar[Mapping[str, str]] = {}
    token_fields: ClassVar[Sequence[pa.Field]] = (pa.field(COLUMN, pa.float32()),)
    needs_head: ClassVar[bool] = True

    @classmethod
    def schemas(cls, info: Mapping[str, Any]) -> dict[str, pa.Schema]:  # noqa: ARG003
        """See `Recorder.schemas`: it adds a column to `tokens`."""
        return {}

    def hooks(self) -> list[Hook]:
        """The whole model, which returns its last hidden states.

        Raises:
            ValueError: an encoder–decoder model whose decoder is not recorded.
        """
        if all(router.token_stack == "encoder" for router in self.routers):
            raise ValueError("--record loss: an encoder predicts no next token; record the decoder too, with --stacks")
        return [
            Hook(
                name="the model",
                module=self.model,
                stack="decoder",
                read=LastHidden.of,
                keep=self._losses,
            )
        ]

    def _losses(self, hidden: LastHidden, grid: Grid) -> _Losses:
        import torch
        from torch.nn import functional

        assert self.head is not None, "needs_head"
        hidden_rh = hidden.hidden_rh
        loss_r = torch.full((len(hidden_rh),), float("nan"), device=hidden_rh.device)
        following_f, ids_f = grid.following_on(hidden_rh.device)
        step = self.head.rows_at_once
        for first in range(0, len(following_f), step):
            own_f = following_f[first : first + step]
            logits_fv = self.head.logits(hidden_rh.index_select(0, own_f - 1)).float()
            losses_f = functional.cross_entropy(logits_fv, ids_f[first : first + step], reduction="none")
            loss_r.index_copy_(0, own_f, losses_f)
        return _Losses(loss_r)

    def probe(self, kept: Sequence[_Losses]) -> None:
        """Needs nothing to be known of the model."""

    def card(self) -> dict[str, Any]:
        """Adds nothing."""
        return {}

    def start(self, tokens: Mapping[str, TokenTable]) -> ShardLoss:
        """See `Recorder.start`."""
        return ShardLoss(tokens)


class ShardLoss(Recording):
    """The losses of one shard."""

    def __init__(self, tokens: Mapping[str, TokenTable]) -> None:
        self._table = tokens["decoder"]
        self._before = sum(len(table.ids) for stack, table in tokens.items() if stack != "decoder")
        self._loss_t: NDArray[np.float32] = np.full(len(self._table.ids), np.nan, np.float32)

    def put(self, batch: Mapping[str, Batch], kept: Sequence[_Losses]) -> None:
        """See `Recording.put`."""
        self._loss_t[batch["decoder"].slots] = kept[0].loss_r.numpy()

    def check(self) -> None:
        """See `Recording.check`."""
        wrong = int((np.isfinite(self._loss_t) != (self._table.position > 0)).sum())
        if wrong:
            raise ValueError(f"loss: {wrong} tokens without a finite loss, or first tokens with one (NaN model?)")

    def token_columns(self) -> dict[str, pa.Array]:
        """See `Recording.token_columns`; the tokens of an encoder come first."""
        loss_t = np.concatenate([np.full(self._before, np.nan, np.float32), self._loss_t])
        return {COLUMN: pa.array(loss_t, mask=np.isnan(loss_t))}
