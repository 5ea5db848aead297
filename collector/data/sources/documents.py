"""Turns a row into a document, or rejects it with a reason.

A bad row records its place and one of a fixed set of reasons. Because data may be private, none of
its content leaves this module.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

from collector.data.sources.labels import LABEL_SEPARATOR, UnusableError, as_text, label_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from collector.data.sources.labels import LabelParts


class TextSpan(NamedTuple):
    """A part of a document's text with a label of its own: a speaker's turn, a quotation, a piece of code."""

    start: int
    """Index of its first character in the text."""
    end: int
    """Index after its last character."""
    label: str


class Message(NamedTuple):
    """A turn of a conversation."""

    role: str
    content: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text whose routing is collected."""

    text: str
    """Empty for a conversation or token ids that the model's tokenizer has not put into words yet."""
    label: str
    """Label that queries group by, usually the language; several are joined by `LABEL_SEPARATOR`."""
    id: str
    """The row's own id, or NAME#ROW."""
    parallel_id: str | None
    """Id that translations of the same text share."""
    source: str | None
    """Column `source`, or the name of the file."""
    target: str | None = None
    """The decoder's text, if a target column was named."""
    spans: tuple[TextSpan, ...] = ()
    messages: tuple[Message, ...] = ()
    """The turns of a conversation; empty for a plain text."""
    ids: tuple[int, ...] = ()
    """The tokens of a text that is tokenized already, special ones included; empty for any other text."""
    row: int = dataclasses.field(default=0, compare=False)
    """Number of the row in the source, from 0."""

    @property
    def labels(self) -> list[str]:
        """Its single labels."""
        return self.label.split(LABEL_SEPARATOR)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BadRow:
    """A row that was rejected as a document."""

    source: str
    """NAME of the source."""
    row: int
    """Number of the row in the source, from 0."""
    reason: str
    """One of `formats.REASONS`."""

    @property
    def where(self) -> str:
        """NAME#ROW."""
        return f"{self.source}#{self.row}"


def as_document(
    fields: Mapping[str, Any] | str, *, name: str, row: int, label: LabelParts, column: str = "",
    has_target: bool = False,
) -> Document | BadRow:  # fmt: skip
    """Turns one row into a document, or into a bad row if it is unusable.

    Args:
        fields: the row's columns by meaning, or the reason why the row is unusable.
        name: name of the source, unique in the plan.
        row: number of the row in the source.
        label: what the label is made of.
        column: what tells this text of a wide row from the others; empty if a row is one text.
        has_target: whether a document also needs a target.
    """
    try:
        if isinstance(fields, str):
            raise UnusableError(fields)
        text = fields.get("text")
        messages = () if isinstance(text, str) else _messages(text)
        ids = () if isinstance(text, str) or messages else _token_ids(text)
        for meaning in ("text",) * (not messages and not ids) + ("target",) * has_target:
            _require_text(meaning, fields.get(meaning))
        own_label = label_of(label, fields)
        spans = _spans(fields["spans"], str(text)) if "spans" in fields and isinstance(text, str) else ()
        # JSON can encode half a surrogate pair, which neither tokenizers nor tables accept.
        if not (are_utf8(fields.values()) and are_utf8(itertools.chain([own_label], *messages, *spans))):
            raise UnusableError("invalid UTF-8")
    except UnusableError as error:
        return BadRow(source=name, row=row, reason=str(error))
    given_id = _string(fields.get("id")) or f"{name}#{row}"
    return Document(
        text=text if isinstance(text, str) else "",
        label=own_label,
        id=f"{given_id}:{column}" if column else given_id,
        parallel_id=_string(fields.get("parallel_id")) or (given_id if column else None),
        source=_string(fields.get("source")) or name,
        target=fields["target"] if has_target else None,
        spans=spans,
        messages=messages,
        ids=ids,
        row=row,
    )


def _require_text(meaning: str, text: Any) -> None:
    if text is None:
        raise UnusableError(f"no {meaning}")
    if not isinstance(text, str):
        raise UnusableError(f"{meaning} is not a string")
    if not text or text.isspace():
        raise UnusableError(f"empty {meaning}")


_LARGEST_ID = 2**31 - 1
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
"""Names of roles in data that writes turns as `from` and `value`."""


def _messages(value: Any) -> tuple[Message, ...]:
    """Returns the turns of a conversation, none for anything else."""
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(turn, dict) for turn in value):
        return ()
    turns = []
    for turn in value:
        role, content = turn.get("role"), _content(turn.get("content"))
        if role is None and isinstance(turn.get("from"), str):
            role, content = _ROLES.get(turn["from"], turn["from"]), turn.get("value")
        if not isinstance(role, str) or not role or not isinstance(content, str):
            raise UnusableError("messages without role and content")
        turns.append(Message(role, content))
    return tuple(turns)


def _token_ids(value: Any) -> tuple[int, ...]:
    """Returns the tokens of a text that comes as token ids, none for anything else."""
    if not isinstance(value, (list, tuple)) or not value or not all(type(each) is int for each in value):
        return ()
    if min(value) < 0 or max(value) > _LARGEST_ID:
        raise UnusableError("token ids out of range")
    return tuple(value)


def _content(content: Any) -> Any:
    """Returns the text of a turn whose content is written as a list of parts, if all parts are text."""
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    return content


def _spans(value: Any, text: str) -> tuple[TextSpan, ...]:
    """Returns the spans of a text."""
    found = []
    for span in value if isinstance(value, (list, tuple)) else () if value is None else (value,):
        start, end, label = map(span.get, ("start", "end", "label")) if isinstance(span, dict) else (None, None, None)
        if type(start) is not int or type(end) is not int or not isinstance(label, str) or not label:
            raise UnusableError("spans are not a list of start, end and label")
        if not 0 <= start < end <= len(text):
            raise UnusableError("span outside the text")
        found.append(TextSpan(start, end, label))
    return tuple(found)


def are_utf8(values: Iterable[Any]) -> bool:
    """Whether all strings among the values can be written as UTF-8."""
    for value in values:
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                return False
    return True


def _string(value: Any) -> str | None:
    """Converts a scalar to text; returns None for an empty value and for anything else."""
    return None if value is None or isinstance(value, (list, dict, bytes)) else as_text(value) or None
