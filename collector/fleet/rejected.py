"""Judges how many rows of a run may become no document, and says what helps against each reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_TEXT = "--text-column names the column"
_LABEL = "--label-column names the column, @file or @folder takes it from the path"
_TARGET = "--target-column names the column"
_JSON = "each line must be one JSON object"
_CSV = "the file's first line must name the columns, and its name must end in .tsv if tabs separate them"
REMEDIES = {
    "no text": _TEXT,
    "text is not a string": _TEXT,
    "empty text": _TEXT,
    "no label": _LABEL,
    "label is not a string or number": _LABEL,
    "label too long": _LABEL,
    "label contains ␟": "rename these labels: ␟ stands between the labels of a document that has several",
    "no target": _TARGET,
    "target is not a string": _TARGET,
    "empty target": _TARGET,
    "invalid JSON": _JSON,
    "not an object": _JSON,
    "invalid CSV": _CSV,
    "wrong number of columns": _CSV,
    "spans are not a list of start, end and label": "--spans-column names the column",
    "span outside the text": "start and end count characters, not bytes, from 0",
    "messages without role and content": "each turn needs a role and a text",
    "chat template does not take the messages": "the model's chat template refuses their order or roles",
    "token beyond the model's vocabulary": "the tokenizer has tokens that the model does not embed",
    "invalid UTF-8": "convert the file, for example with iconv",
}
"""Reason for which rows are rejected -> what helps if it is true of too many."""


def told(reason: str, count: int) -> str:
    """One reason in words: how many rows, why, and what helps."""
    remedy = REMEDIES.get(reason)
    return f"{count:,} {reason}" + (f" ({remedy})" if remedy else "")


def complaint(rejected: Mapping[str, int], planned: int, limit: float = 1.0) -> str | None:
    """Says in one line that too many rows were rejected, and what helps; None if they are few enough.

    Args:
        rejected: reason -> rows of the run that became no document so far.
        planned: rows of the plan.
        limit: the share of them that may be rejected. Even a limit of 1 needs one document.
    """
    total = sum(rejected.values())
    if total < planned and total <= limit * planned:
        return None
    if total >= planned:
        said = f"no document was collected, all {planned:,} rows were rejected"
    else:
        said = f"{total:,} of {planned:,} rows were rejected, more than --max-rejected {limit:g} allows"
    commonest = sorted(rejected.items(), key=lambda reason: -reason[1])
    reasons = "; ".join(told(reason, count) for reason, count in commonest if count)
    way_on = "" if total >= planned else "; with --max-rejected 1 the same command accepts these and goes on"
    return f"{said}: {reasons}. Other columns or other data need another --out{way_on}"
