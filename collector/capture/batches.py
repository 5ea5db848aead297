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
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from collector.data.sources import TextSpan

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
    span: NDArray[np.int64] | None = None
    """[T] the span of the text that the token lies in, as an index into `span_labels`, -1 for none; None if no text has
    any."""
    span_labels: tuple[str, ...] = ()
    labels: tuple[tuple[str, ...], ...] | None = None
    """[D] each document's labels; None if no recorder asks."""
    places: NDArray[np.int64] | None = None
    """[T] each token's place in its document, ascending; None if these are 0, 1, 2 …"""
    token_class: NDArray[np.str_] | None = None
    """[T] each token's class, as `--by token_class` names it; None if no recorder asks."""
    prompt_lengths: NDArray[np.int64] | None = None
    """[D] the tokens that the model was given, the others it wrote; None if it wrote nothing."""
    stopped: NDArray[np.bool_] | None = None
    """[D] whether a stop token ended the document; None if the model wrote nothing."""

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
        if self.places is not None:
            return self.places
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


def tokenize(
    tokenizer: Any, texts: Sequence[str], max_length: int, *, as_target: bool = False,
    spans: Sequence[Sequence[TextSpan]] | None = None, is_framed: Sequence[bool] | None = None,
    ids: Sequence[Sequence[int]] | None = None,
) -> TokenTable:  # fmt: skip
    """Tokenizes documents as the tokenizer wants them, special tokens included.

    Args:
        tokenizer: a tokenizer of transformers.
        texts: D texts.
        max_length: longest document in tokens, special tokens included. The tokenizer itself cuts longer ones,
            so that a closing special token stays.
        as_target: as the decoder's texts, which some tokenizers frame differently (with a language code).
        spans: [D] labelled parts of each text (default: none), for a fast tokenizer. A token lies in the shortest one
            that holds the character in its middle.
        is_framed: [D] whether the text has its special tokens already, from a chat template (default: none has).
        ids: [D] the tokens of texts that are tokenized already, empty for others (default: none is).
    """
    meaning = "text_target" if as_target else "text"
    framed = np.zeros(len(texts), bool) if is_framed is None else np.asarray(is_framed, bool)
    given = np.array([bool(own) for own in ids or [()] * len(texts)], bool)
    options = {"return_offsets_mapping": True} if spans and any(spans) else {}
    encoded: list[_Encoded] = [_Encoded()] * len(texts)
    for adds_special in (True, False):
        documents = np.flatnonzero(~given & (framed != adds_special)).tolist()
        one_by_one = {"add_special_tokens": adds_special, **options}
        own = _encode(tokenizer, [texts[d] for d in documents], meaning, **one_by_one)
        for d, each in zip(documents, own, strict=True):
            is_cut = len(each.ids) > max_length
            if is_cut:
                (each,) = _encode(tokenizer, [texts[d]], meaning, truncation=True, max_length=max_length, **one_by_one)
            encoded[d] = dataclasses.replace(each, is_cut=is_cut)
    for d in np.flatnonzero(given).tolist():
        assert ids is not None, "it is given as ids"
        encoded[d] = _Encoded.of_ids(ids[d], max_length)
    lengths = np.array([len(each.ids) for each in encoded], dtype=np.int64)
    flat_ids = _flat([each.ids for each in encoded])
    is_special = _flat([each.is_special for each in encoded]).astype(bool)
    if (framed | given).any():
        is_special |= np.repeat(framed | given, lengths) & np.isin(flat_ids, special_ids(tokenizer))
    labels = tuple(dict.fromkeys(span.label for own in spans or () for span in own))
    placed = [_in_spans(each.offsets, own, labels, len(text))
              for each, own, text in zip(encoded, spans or ((),) * len(texts), texts, strict=True)]  # fmt: skip
    return TokenTable(
        ids=flat_ids,
        is_special=is_special,
        starts=np.concatenate([[0], lengths.cumsum()]).astype(np.int64),
        truncated=np.array([each.is_cut for each in encoded], dtype=bool),
        span=_flat(placed) if labels else None,
        span_labels=labels,
    )


def special_ids(tokenizer: Any) -> NDArray[np.int64]:
    """Returns the ids of all tokens that are no text, such as BOS or the frame of a turn."""
    return np.array([number for number, token in tokenizer.added_tokens_decoder.items() if token.special], np.int64)


def without_closing(table: TokenTable, documents: Iterable[int]) -> TokenTable:
    """Leaves out special tokens that a tokenizer added at the end of some documents, so that a model can write on."""
    keep = np.ones(len(table.ids), bool)
    for document in documents:
        first, last = int(table.starts[document]), int(table.starts[document + 1]) - 1
        while last > first and table.is_special[last]:
            keep[last] = False
            last -= 1
    left = np.concatenate([[0], keep.cumsum()])
    span = None if table.span is None else table.span[keep]
    return dataclasses.replace(
        table, ids=table.ids[keep], is_special=table.is_special[keep], span=span, starts=left[table.starts]
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Encoded:
    """A tokenized document."""

    ids: Sequence[int] = ()
    is_special: Sequence[int] = ()
    offsets: Sequence[tuple[int, int]] = ()
    """First character of each token, and the one after its last; equal for special tokens."""
    is_cut: bool = False

    @classmethod
    def of_ids(cls, ids: Sequence[int], max_length: int) -> _Encoded:
        """A document that comes as token ids; no token lies in a span, and which are special is not known yet."""
        kept = ids[:max_length]
        zeros = [0] * len(kept)
        return cls(ids=kept, is_special=zeros, offsets=[(0, 0)] * len(kept), is_cut=len(ids) > max_length)


def _flat(parts: Sequence[Any]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(0, np.int64), *(np.asarray(part, np.int64) for part in parts)])


def _in_spans(
    offsets: Sequence[tuple[int, int]], spans: Sequence[TextSpan], labels: Sequence[str], characters: int
) -> NDArray[np.int64]:
    """Returns the span of each token, as an index into `labels`, -1 for none."""
    if not spans:
        return np.full(len(offsets), -1)
    span_of_character = np.full(characters + 1, -1)
    for span in sorted(spans, key=lambda span: span.start - span.end):  # the shortest last, so that it stays
        span_of_character[span.start : span.end] = labels.index(span.label)
    bounds = np.asarray(offsets, np.int64).reshape(-1, 2)
    return np.where(bounds[:, 0] < bounds[:, 1], span_of_character[bounds.sum(axis=1) // 2], -1)


def shift_right(table: TokenTable, start_id: int) -> TokenTable:
    """Shifts texts into the decoder's inputs: the start token, then all tokens but the last.

    Lengths do not change; the start token counts as a special token.
    """
    first = table.starts[:-1][table.lengths > 0]
    ids, is_special = np.roll(table.ids, 1), np.roll(table.is_special, 1)
    ids[first], is_special[first] = start_id, True
    span = table.span
    if span is not None:
        span = np.roll(span, 1)
        span[first] = -1
    return dataclasses.replace(table, ids=ids, is_special=is_special, span=span)


def _encode(tokenizer: Any, texts: Sequence[str], meaning: str, **options: Any) -> list[_Encoded]:
    if not texts:
        return []
    # verbose=False: a document beyond the model's length is cut and counted here, not warned about.
    encoded = tokenizer(
        **{meaning: list(texts)}, return_attention_mask=False, return_special_tokens_mask=True, verbose=False, **options
    )
    offsets = encoded.get("offset_mapping") or [()] * len(texts)
    columns = (encoded["input_ids"], encoded["special_tokens_mask"], offsets)
    return [_Encoded(ids=i, is_special=s, offsets=o) for i, s, o in zip(*columns, strict=True)]


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
        memory fails at once and not after hours. Documents without tokens are in none.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    lengths = lengths[:, None] if lengths.ndim == 1 else lengths
    order = np.argsort(-lengths.sum(1), kind="stable")[: np.count_nonzero(lengths.sum(1))]
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
