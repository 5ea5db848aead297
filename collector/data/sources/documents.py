"""What a row becomes: a document, or the reason why it is none.

A bad row says where it is and what is wrong with it, in words that are the same for all rows of the
kind; nothing of its content leaves this module, for data may be private.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

LONGEST_LABEL = 1000
"""In characters. A label is repeated for every token; what is longer is a text in the wrong column."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text to collect the routing of."""

    text: str
    label: str
    """What queries group by, as a rule the language."""
    id: str
    """The row's own id, or NAME#ROW."""
    parallel_id: str | None
    """What translations of the same text have in common; column `parallel_id`."""
    source: str | None
    """Column `source`, or the name of the file."""
    target: str | None = None
    """The decoder's text, where a column for it was named."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BadRow:
    """A row that is no document."""

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
    fields: Mapping[str, Any] | str, *, name: str, row: int, label: str | None, has_target: bool = False
) -> Document | BadRow:
    """Turns one row as a format read it into a document.

    Args:
        fields: the row's columns by meaning, or why it has none.
        name: of the source, unique in the plan.
        row: number of the row in the source.
        label: of all rows of the source; None if each has its own.
        has_target: whether a document needs a target as well.
    """
    if isinstance(fields, str):
        return BadRow(source=name, row=row, reason=fields)
    own_label = label or fields.get("label")
    reason = _text_reason(fields, has_target=has_target) or _label_reason(own_label)
    # JSON can spell half a surrogate pair, which no tokenizer and no table takes.
    if reason is None and not are_utf8(fields.values()):
        reason = "invalid UTF-8"
    if reason is not None:
        return BadRow(source=name, row=row, reason=reason)
    return Document(
        text=fields["text"],
        label=str(own_label),
        id=_string(fields.get("id")) or f"{name}#{row}",
        parallel_id=_string(fields.get("parallel_id")),
        source=_string(fields.get("source")) or name,
        target=fields["target"] if has_target else None,
    )


def _text_reason(fields: Mapping[str, Any], *, has_target: bool) -> str | None:
    """Why the texts make no document; None if they do."""
    for meaning in ("text", "target") if has_target else ("text",):
        text = fields.get(meaning)
        if text is None:
            return f"no {meaning}"
        if not isinstance(text, str):
            return f"{meaning} is not a string"
        if not text or text.isspace():
            return f"empty {meaning}"
    return None


def _label_reason(label: Any) -> str | None:
    """Why a value is no label; None if it is one."""
    if isinstance(label, (list, dict, bytes)):
        return "label is not a string or number"
    # NaN is what pandas writes where there is none.
    if label is None or (isinstance(label, float) and math.isnan(label)):
        return "no label"
    text = str(label)
    if not text or text.isspace():
        return "no label"
    return "label too long" if len(text) > LONGEST_LABEL else None


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
    """A scalar as text; None for nothing and for what is no scalar."""
    return None if value is None or isinstance(value, (list, dict, bytes)) else str(value) or None
