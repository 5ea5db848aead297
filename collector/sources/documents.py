"""What a row becomes: a document, or the reason why it is none.

A bad row says where it is and what is wrong with it, in words that are the same for all rows of the
kind; nothing of its content leaves this module, for data may be private.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class BadRow:
    """A row that is no document."""

    where: str
    """NAME#ROW, rows counted from 0."""
    reason: str
    """One of `formats.REASONS`."""


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
    where = f"{name}#{row}"
    reason = fields if isinstance(fields, str) else _reason(fields, label, has_target=has_target)
    if reason is not None or isinstance(fields, str):
        return BadRow(where=where, reason=str(reason))
    return Document(
        text=fields["text"],
        label=label or str(fields["label"]),
        id=_string(fields.get("id")) or where,
        parallel_id=_string(fields.get("parallel_id")),
        source=_string(fields.get("source")) or name,
        target=fields["target"] if has_target else None,
    )


def _reason(fields: Mapping[str, Any], label: str | None, *, has_target: bool) -> str | None:
    """Why the columns make no document; None if they do."""
    for meaning in ("text", "target") if has_target else ("text",):
        text = fields.get(meaning)
        if text is None:
            return f"no {meaning}"
        if not isinstance(text, str):
            return f"{meaning} is not a string"
        if not text.strip():
            return f"empty {meaning}"
    own_label = label or fields.get("label")
    if own_label is None or not str(own_label).strip():
        return "no label"
    if isinstance(own_label, (list, dict, bytes)):
        return "label is not a string or number"
    # JSON can spell half a surrogate pair, which no tokenizer and no table takes.
    strings = [own_label, *fields.values()]
    return None if all(_encodable(value) for value in strings) else "invalid UTF-8"


def _encodable(value: Any) -> bool:
    if not isinstance(value, str) or value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _string(value: Any) -> str | None:
    """A scalar as text; None for nothing and for what is no scalar."""
    return None if value is None or isinstance(value, (list, dict, bytes)) else str(value) or None
