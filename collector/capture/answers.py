"""Reads the texts that a model wrote: as words, and by the parts of a conversation that they are."""

from __future__ import annotations

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
    own = [
        table.ids[start + prompt : end].tolist()
        for start, prompt, end in zip(table.starts[:-1], table.prompt_lengths, table.starts[1:], strict=True)
    ]
    if any(document.messages for document in text.documents):
        table = _with_spans(table, own, text, tokenizer)
    answers = [tokenizer.decode(answer, skip_special_tokens=True) for answer in own]
    return dataclasses.replace(text, tokens={stack: table}, answers=answers)


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
    """Returns which tokens of an answer lie in thoughts, by the middle of the characters that each adds to the text."""
    # What a template opens at the end of the prompt, the answer closes.
    opened = prompt.rpartition("<think>")[1] if "</think>" not in prompt.rpartition("<think>")[2] else ""
    whole = opened + tokenizer.decode(answer)
    spans = answered_thoughts(whole)
    if not spans:
        return np.zeros(len(answer), bool)
    ends = [len(opened) + len(tokenizer.decode(answer[:count])) for count in range(len(answer) + 1)]
    middles = (np.array(ends[:-1]) + np.array(ends[1:])) / 2
    return np.logical_or.reduce([(start <= middles) & (middles < end) for start, end in spans])
