"""The tables of what edits do to predictions: `effects`, by document, and `token_effects`.

Shapes: A arms and controls, and `NO_EDIT` behind them; D documents and T tokens of a shard, F tokens with a prediction.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from collector.capture.recorder import Recording
from collector.models.edits import NO_EDIT
from collector.store import tables

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from collector.capture.batches import Batch, TokenTable
    from collector.capture.sampling import Nothing
    from collector.capture.shard_text import ShardText
    from collector.models.edits import Arm

TABLE = "effects"
NOISE = -1
"""The place of the pass without edits, behind all arms."""
SUMS = ("tokens", "loss", "base_loss", "divergence", "flips", "decisions", "rerouted")
"""What is added up for each document, in this order."""
SCHEMA = pa.schema(
    [
        pa.field("shard", pa.uint32(), nullable=False),
        pa.field("doc", pa.uint32(), nullable=False),
        pa.field("arm", tables.NAME, nullable=False),
        pa.field("control", pa.uint16(), nullable=False),
        pa.field("tokens", pa.uint32(), nullable=False),
        *(pa.field(name, pa.float64(), nullable=False) for name in ("loss", "base_loss", "divergence")),
        *(pa.field(name, pa.uint32(), nullable=False) for name in ("flips", "decisions", "rerouted")),
    ]
)


TOKENS = "token_effects"
PER_TOKEN = ("change", "divergence", "flipped")
"""What is kept of each token, in this order."""
TOKENS_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.uint32(), nullable=False),
        pa.field("tok", pa.uint32(), nullable=False),
        pa.field("arm", tables.NAME, nullable=False),
        pa.field("change", pa.float32(), nullable=False),
        pa.field("divergence", pa.float32(), nullable=False),
        pa.field("flipped", pa.bool_(), nullable=False),
    ]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effects:
    """What some arms did to one batch, on the host."""

    arms: NDArray[np.int64]
    """Their places, see `ShardEffects`."""
    doc_n: NDArray[np.int64]
    """Documents of the batch."""
    sums_an7: NDArray[np.float64]
    """[arms, documents, 7] `SUMS`."""
    slots_f: NDArray[np.int64] | None
    """[F] places of the tokens in the shard, if they are kept."""
    tokens_af3: NDArray[np.float32] | None
    """[arms, F, 3] `PER_TOKEN`."""


class ShardEffects(Recording):
    """The effects of all arms on one shard's documents."""

    def __init__(self, arms: Sequence[Arm], table: TokenTable, first_tok: int | None = None) -> None:
        """Makes room.

        Args:
            arms: arms and controls; `NO_EDIT` takes the place behind them.
            table: the decoder's tokens.
            first_tok: number of its first token in the shard; None if tokens are not kept.
        """
        self._titles = [arm.title for arm in arms] + [NO_EDIT]
        self._names = [arm.name for arm in arms] + [NO_EDIT]
        self._controls = [arm.control for arm in arms] + [0]
        self._sums_an7 = np.full((len(self._names), len(table.lengths), len(SUMS)), np.nan)
        self._own = np.array([number for number, arm in enumerate(arms) if not arm.control], np.int64)
        self._first_tok = first_tok
        self._has_prediction_t = (table.position > 0) & ~table.is_special
        tokens = 0 if first_tok is None else len(table.ids)
        self._tokens_at3 = np.full((len(self._names), tokens, len(PER_TOKEN)), np.nan, np.float32)

    def put(self, batch: Mapping[str, Batch], kept: Sequence[Nothing]) -> None:
        """See `Recording.put`: nothing leaves the device during the passes."""

    def conclude(self, result: list[Effects]) -> None:
        """See `Recording.conclude`; a batch that did not fit came once more, and its later sums count."""
        for one in result:
            self._sums_an7[np.ix_(one.arms, one.doc_n)] = one.sums_an7
            if one.slots_f is not None:
                self._tokens_at3[np.ix_(one.arms, one.slots_f)] = one.tokens_af3

    def check(self) -> None:
        """See `Recording.check`."""
        for title, sums_n7 in zip(self._titles, self._sums_an7, strict=True):
            if wrong := int((~np.isfinite(sums_n7)).any(-1).sum()):
                raise ValueError(
                    f"effects of arm {title!r}: not finite, or missing, for {wrong} documents (NaN model?)"
                )
        if self._first_tok is not None and not np.isfinite(self._tokens_at3[:, self._has_prediction_t]).all():
            raise ValueError("effects: a token that follows another one has none")

    def write(self, folder: Path, shard: int, text: ShardText) -> dict[str, int]:  # noqa: ARG002
        """Writes one row per document and arm, arm by arm."""
        arms, documents, _ = self._sums_an7.shape
        columns: dict[str, Any] = {
            "shard": np.full(arms * documents, shard), "doc": np.tile(np.arange(documents), arms),
            "arm": pa.array(np.repeat(self._names, documents), pa.string()).dictionary_encode(),
            "control": np.repeat(self._controls, documents),
        }  # fmt: skip
        for number, name in enumerate(SUMS):
            columns[name] = self._sums_an7[..., number].ravel()
        tables.write_table(folder / TABLE, tables.table_of(SCHEMA, columns))
        return {TABLE: arms * documents} | ({} if self._first_tok is None else self._write_tokens(folder, shard))

    def _write_tokens(self, folder: Path, shard: int) -> dict[str, int]:
        """Writes one row per token with a prediction and arm, arm by arm."""
        tok_f = np.flatnonzero(self._has_prediction_t)
        names = [self._names[number] for number in self._own]
        columns: dict[str, Any] = {
            "shard": np.full(len(names) * len(tok_f), shard),
            "tok": np.tile(tok_f + (self._first_tok or 0), len(names)),
            "arm": pa.array(np.repeat(names, len(tok_f)), pa.string()).dictionary_encode(),
        }
        for number, name in enumerate(PER_TOKEN):
            values = self._tokens_at3[np.ix_(self._own, tok_f)][..., number].ravel()
            columns[name] = values.astype(bool) if name == "flipped" else values
        tables.write_table(folder / TOKENS, tables.table_of(TOKENS_SCHEMA, columns))
        return {TOKENS: len(columns["tok"])}
