"""Reads the texts that a model wrote: as words, and by the parts of a conversation that they are."""

from __future__ import annotations

import bisect
import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from collector.capture.conversations import ASSISTANT, THINK, answered_thoughts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from collector.capture.batches import TokenTable
    from collector.capture.shard_text import ShardText


def with_answers(text: ShardText, tokens: dict[str, TokenTable], tokenizer: Any) -> ShardText:
    """Returns a shard with its finished texts: the words of every answer, and the spans of answers to conversations.

    Args:
        text: the shard as the model was given it.
        tokens: the finished texts, by stack.
        tokenizer: of the model.
    """
    (stack,) = tokens
    table = tokens[stack]
    assert table.prompt_lengths is not None, "the model wrote on"
    begins_d = table.starts[:-1] + table.prompt_lengths
    own = [table.ids[begin:end].tolist() for begin, end in zip(begins_d, table.starts[1:], strict=True)]
    before = [table.ids[max(begin - 1, start) : begin].tolist()
              for start, begin in zip(table.starts[:-1], begins_d, strict=True)]  # fmt: skip
    answers = [_words(last, answer, tokenizer) for last, answer in zip(before, own, strict=True)]
    if any(document.messages for document in text.documents):
        table = _with_spans(table, own, text, tokenizer)
    return dataclasses.replace(text, tokens={stack: table}, answers=answers)


def _words(last: list[int], answer: list[int], tokenizer: Any) -> str:
    """Returns an answer in words, after the last token of its prompt: some decoders drop a space in front."""
    alone, both = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (last, last + answer))
    return both[len(alone) :] if both.startswith(alone) else tokenizer.decode(answer, skip_special_tokens=True)


def _with_spans(table: TokenTable, own: Sequence[list[int]], text: ShardText, tokenizer: Any) -> TokenTable:
    """Labels the tokens of answers to conversations as the assistant's, and its thoughts."""
    labels = tuple(dict.fromkeys((*table.span_labels, ASSISTANT, THINK)))
    span = np.full(len(table.ids), -1) if table.span is None else table.span.copy()
    for document, answer, end in zip(text.documents, own, table.starts[1:].tolist(), strict=True):
        if document.messages:
            place = slice(end - len(answer), end)
            is_thought = _thoughts(answer, document.text, tokenizer)
            label = np.where(is_thought, labels.index(THINK), labels.index(ASSISTANT))
            span[place] = np.where(table.is_special[place], -1, label)
    return dataclasses.replace(table, span=span, span_labels=labels)


def _thoughts(answer: list[int], prompt: str, tokenizer: Any) -> NDArray[np.bool_]:
    """Returns which tokens of an answer lie in thoughts; one that ends a thought and goes on lies in it."""
    # What a template opens at the end of the prompt, the answer closes.
    opened = "<think>" if prompt.rstrip().endswith("<think>") else ""
    is_thought = np.zeros(len(answer), bool)

    def characters(count: int) -> int:
        """Characters of the first tokens; one whose bytes are not all there yet does not count."""
        return len(opened) + len(tokenizer.decode(answer[:count]).rstrip("\ufffd"))

    counts = range(len(answer) + 1)
    for start, end in answered_thoughts(opened + tokenizer.decode(answer)):
        first, last = (bisect.bisect_left(counts, place, key=characters) for place in (start, end))
        is_thought[first:last] = True
    return is_thought
