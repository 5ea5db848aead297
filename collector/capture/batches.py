"""Tokenizes the documents of a shard, and packs them by length into padded batches under a token budget.

Batches depend on the shard alone, so a shard that is collected again repeats its numerics.
Within a shard the packing is optimal for its cost model: documents sorted by length are cut into
batches by dynamic programming, which minimises padded tokens plus a fixed charge per batch. A document
of an encoder–decoder model has two lengths, and its padded tokens are those of both stacks.
Every real token has a slot: its index in the shard's token table (documents in source order,
positions ascending). Results find their place by it, whatever the order of batches or the side of the padding.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

BATCH_CHARGE = 1 / 16
"""Fixed cost of a forward pass, as a share of the token budget."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenTable:
    """The tokens of D documents, one after the other; T tokens in all."""

    ids: NDArray[np.int64]
    """[T] token ids."""
    is_special: NDArray[np.bool_]
    """[T] whether the tokenizer added the token itself (BOS, EOS …)."""
    starts: NDArray[np.int64]
    """[D + 1] slot of each document's first token; the last entry is T."""
    truncated: NDArray[np.bool_]
    """[D] whether the document was cut at the maximum length."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[D] tokens per document."""
        return np.diff(self.starts)

    @property
    def doc(self) -> NDArray[np.int64]:
        """[T] each token's document."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @property
    def position(self) -> NDArray[np.int64]:
        """[T] each token's place in its document, from 0."""
        return np.arange(len(self.ids)) - np.repeat(self.starts[:-1], self.lengths)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """One padded forward pass: B documents, S positions, T real tokens."""

    input_ids: NDArray[np.int64]
    """[B, S] token ids."""
    attention_mask: NDArray[np.int64]
    """[B, S] 1 for real tokens, 0 for padding."""
    slots: NDArray[np.int64]
    """[T] slot of each real token, in the row-major order of the mask."""


def tokenize(tokenizer: Any, texts: Sequence[str], max_length: int, *, as_target: bool = False) -> TokenTable:
    """Tokenizes documents as the tokenizer wants them, special tokens included.

    Args:
        tokenizer: a tokenizer of transformers.
        texts: D texts.
        max_length: longest document in tokens, special tokens included. The tokenizer itself cuts longer ones,
            so that a closing special token stays.
        as_target: as the decoder's texts, which some tokenizers frame differently (with a language code).
    """
    meaning = "text_target" if as_target else "text"
    encoded = _encode(tokenizer, texts, meaning)
    truncated = np.array([len(ids) > max_length for ids, _ in encoded], dtype=bool)
    for index in np.flatnonzero(truncated).tolist():
        encoded[index] = _encode(tokenizer, [texts[index]], meaning, truncation=True, max_length=max_length)[0]
    lengths = np.array([len(ids) for ids, _ in encoded], dtype=np.int64)
    flat = [np.concatenate([np.zeros(0, np.int64), *(np.asarray(part, np.int64) for part in column)])
            for column in (tuple(zip(*encoded, strict=True)) or ((), ()))]  # fmt: skip
    starts = np.concatenate([[0], lengths.cumsum()]).astype(np.int64)
    return TokenTable(ids=flat[0], is_special=flat[1].astype(bool), starts=starts, truncated=truncated)


def shift_right(table: TokenTable, start_id: int) -> TokenTable:
    """Shifts texts into the decoder's inputs: the start token, then all tokens but the last.

    Lengths do not change; the start token counts as a special token.
    """
    first = table.starts[:-1][table.lengths > 0]
    ids, is_special = np.roll(table.ids, 1), np.roll(table.is_special, 1)
    ids[first], is_special[first] = start_id, True
    return dataclasses.replace(table, ids=ids, is_special=is_special)


def _encode(tokenizer: Any, texts: Sequence[str], meaning: str, **options: Any) -> list[tuple[list[int], list[int]]]:
    if not texts:
        return []
    # verbose=False: a document beyond the model's length is cut and counted here, not warned about.
    encoded = tokenizer(
        **{meaning: list(texts)}, return_attention_mask=False, return_special_tokens_mask=True, verbose=False, **options
    )
    return list(zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True))


def pack(lengths: Sequence[int] | NDArray[np.int64], tokens_per_batch: int) -> list[NDArray[np.int64]]:
    """Cuts documents into batches of similar length.

    Minimises the sum over batches of rows x longest row, plus `BATCH_CHARGE` x budget per batch,
    over all ways to cut the documents sorted by length. No batch exceeds the budget, except one
    that holds a single document longer than it.

    Args:
        lengths: [D] tokens per document, or [D, 2] for two stacks. Then documents are sorted by the sum of
            both, and the length of a batch's rows is the longest of one stack plus the longest of the other.
        tokens_per_batch: the budget.

    Returns:
        Document indices per batch, longest documents first, so that a batch that does not fit into
        memory fails at once and not after hours.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    lengths = lengths[:, None] if lengths.ndim == 1 else lengths
    order = np.argsort(-lengths.sum(1), kind="stable")
    widths = lengths[order]
    n = len(order)
    cost = np.full(n + 1, np.inf)
    cost[0] = 0.0
    begin = np.zeros(n + 1, dtype=np.int64)
    charge = BATCH_CHARGE * tokens_per_batch
    for first in range(n):
        # More rows never fit: no row is shorter than the first document, which is the longest.
        most = min(n - first, max(1, tokens_per_batch // max(1, int(widths[first].sum()))))
        longest = np.maximum(np.maximum.accumulate(widths[first : first + most]).sum(1), 1)
        padded = np.arange(1, most + 1) * longest
        rows = max(1, int((padded <= tokens_per_batch).sum()))
        ends = slice(first + 1, first + rows + 1)
        candidate = cost[first] + charge + padded[:rows]
        better = candidate < cost[ends]
        cost[ends][better] = candidate[better]
        begin[ends][better] = first
    batches = []
    end = n
    while end > 0:
        batches.append(order[begin[end] : end])
        end = int(begin[end])
    return batches[::-1]


def pad(
    table: TokenTable, documents: NDArray[np.int64], pad_id: int, side: Literal["left", "right"] = "right"
) -> Batch:
    """Pads documents of a token table into one batch."""
    lengths = table.lengths[documents]
    width = int(lengths.max(initial=0))
    column = np.arange(width)
    mask = column < lengths[:, None] if side == "right" else column >= width - lengths[:, None]
    slots = np.concatenate([np.arange(table.starts[d], table.starts[d + 1]) for d in documents])
    input_ids = np.full(mask.shape, pad_id, dtype=np.int64)
    input_ids[mask] = table.ids[slots]
    return Batch(input_ids=input_ids, attention_mask=mask.astype(np.int64), slots=slots)
