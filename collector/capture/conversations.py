"""Puts conversations into words, as the model's chat template writes them, with the role of every part, and token ids.

Each turn's content becomes a span of the text, labelled with the turn's role; what lies between `<think>` and
`</think>` in it becomes a span `think` of its own. The template's own words, such as role names, lie in no span.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

from collector.data.sources import BadRow, Document, TextSpan

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from collector.data.sources import Message

ASSISTANT = "assistant"
THINK = "think"
_THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_UNFINISHED = re.compile(r"<think>(.*?)(?:</think>|\Z)", re.DOTALL)


def require_tokenizer(tokenizer: Any, model: str, *, conversations: bool) -> None:
    """Checks that a tokenizer can tell which span a token lies in, and has a template for conversations.

    Args:
        tokenizer: of the model.
        model: its name, for messages.
        conversations: whether documents are conversations.

    Raises:
        ValueError: it cannot, or has none.
    """
    if conversations and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"--text-column holds conversations, but the tokenizer of --model {model} has no chat template: take the "
            "instruction-tuned model, or write each conversation as one text"
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer of --model {model} ({type(tokenizer).__name__}) does not say which characters a token "
            "stands for, so spans cannot be recorded: leave out --spans-column, and write conversations as texts"
        )


def put_into_words(
    tokenizer: Any, rows: Iterable[Document | BadRow], name: str, *, to_answer: bool = False
) -> Iterator[Document | BadRow]:
    """Yields the rows, with conversations and token ids as texts; what the template refuses becomes a bad row.

    Args:
        tokenizer: of the model.
        rows: of a shard.
        name: of their source in the plan.
        to_answer: whether the model shall answer: conversations lose the assistant's last turn, and end where the
            template has the assistant begin.
    """
    for row in rows:
        if isinstance(row, Document) and row.ids:
            yield dataclasses.replace(row, text=tokenizer.decode(list(row.ids), skip_special_tokens=True))
            continue
        if isinstance(row, BadRow) or not row.messages:
            yield row
            continue
        messages = _to_answer(row.messages) if to_answer else row.messages
        if not messages:
            yield BadRow(source=name, row=row.row, reason="conversation without a turn to answer")
            continue
        text = _rendered(tokenizer, messages, begin=to_answer)
        if text is None or not text.strip():
            yield BadRow(source=name, row=row.row, reason="chat template does not take the messages")
        else:
            spans = _with_thoughts(text, _turns(tokenizer, messages, text))
            yield dataclasses.replace(row, text=text, spans=tuple(spans))


def _to_answer(messages: Sequence[Message]) -> Sequence[Message]:
    """Returns the turns up to the last one that is not the assistant's."""
    last = max((number for number, turn in enumerate(messages, 1) if turn.role != ASSISTANT), default=0)
    return messages[:last]


def _rendered(tokenizer: Any, messages: Sequence[Message], *, begin: bool = False) -> str | None:
    """Returns the text of a conversation, None if the template refuses it; `begin` lets the assistant begin."""
    import jinja2

    turns = [{"role": turn.role, "content": turn.content} for turn in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=begin))
    except (jinja2.TemplateError, TypeError, KeyError, ValueError, AttributeError):
        return None


def _turns(tokenizer: Any, messages: Sequence[Message], text: str) -> Iterator[TextSpan]:
    """Yields the span of each turn's content.

    As a rule a template appends turn after turn, so the text of the first turns tells where the next one begins and
    ends. Where it writes earlier turns differently, the content is searched from the end of the turn before.
    """
    begin = 0
    for number, turn in enumerate(messages, 1):
        so_far = text if number == len(messages) else _rendered(tokenizer, messages[:number])
        appended = so_far is not None and text.startswith(so_far) and len(so_far) > begin
        end = len(so_far) if so_far is not None and appended else len(text)
        # Templates of reasoning models leave the thoughts of earlier turns out.
        for content in (turn.content.strip(), turn.content.rpartition("</think>")[2].strip()):
            # The last place in the turn's own text, because a header may hold the same word; else the next place.
            place = text.rfind(content, begin, end) if appended else text.find(content, begin)
            if content and place >= 0:
                yield TextSpan(place, place + len(content), turn.role)
                begin = place + len(content)
                break
        begin = end if appended else begin


def _with_thoughts(text: str, spans: Iterable[TextSpan]) -> Iterator[TextSpan]:
    for span in spans:
        yield span
        for thought in _THOUGHT.finditer(text, span.start, span.end):
            if thought[1]:
                yield TextSpan(*thought.span(1), THINK)


def answered_thoughts(text: str) -> list[tuple[int, int]]:
    """Returns start and end of each thought in an answer, the last of which may be unfinished."""
    return [thought.span(1) for thought in _UNFINISHED.finditer(text) if thought[1]]
