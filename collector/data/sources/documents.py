"""Turns a row into a document, or rejects it with a reason.

A bad row records its place and one of a fixed set of reasons. Because data may be private, none of
its content leaves this module.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

LONGEST_LABEL = 1000
"""In characters. Labels are repeated for every token; a longer one is probably a text in the wrong column."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text whose routing is collected."""

    text: str
    label: str
    """Label that queries group by, usually the language."""
    id: str
    """The row's own id, or NAME#ROW."""
    parallel_id: str | None
    """Id that translations of the same text share; column `parallel_id`."""
    source: str | None
    """Column `source`, or the name of the file."""
    target: str | None = None
    """The decoder's text, if a target column was named."""


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
    fields: Mapping[str, Any] | str, *, name: str, row: int, label: str | None, has_target: bool = False
) -> Document | BadRow:
    """Turns one row into a document, or into a bad row if it is unusable.

    Args:
        fields: the row's columns by meaning, or the reason why the row is unusable.
        name: name of the source, unique in the plan.
        row: number of the row in the source.
        label: common label of the source's rows; None if each has its own.
        has_target: whether a document also needs a target.
    """
    if isinstance(fields, str):
        return BadRow(source=name, row=row, reason=fields)
    own_label = label or fields.get("label")
    reason = _text_reason(fields, has_target=has_target) or _label_reason(own_label)
    # JSON can encode half a surrogate pair, which neither tokenizers nor tables accept.
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
    """Returns why the texts are unusable, or None if they are fine."""
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
    """Returns why a value is unusable as a label, or None if it is fine."""
    if isinstance(label, (list, dict, bytes)):
        return "label is not a string or number"
    # pandas writes NaN for a missing label.
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
    """Converts a scalar to text; returns None for an empty value and for anything else."""
    return None if value is None or isinstance(value, (list, dict, bytes)) else str(value) or None
