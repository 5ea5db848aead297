"""Says what a document's label is made of: columns, and parts of the file's path.

The value of `--label-column` is one of

- the name of a column, or a dotted path into nested values;
- `@file`, the file's name up to its first dot; `@folder`, the name of its folder, `@folder:2` of the one above it …;
- `@path:REGEX`, the first group of a regular expression that is searched in the path;
- `@column`, of wide files, the part of the text column's name that `*` stands for;
- several of these in braces, with text between them: `{iso_639_3}_{iso_15924}`.

A folder called `lang=en` gives its files a column `lang`, as in Hive's layout.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import string
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from collector.data.sources.files import file_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

LABEL_SEPARATOR = "␟"
"""Stands between the labels of a document that has several; no single label contains it."""
FROM_FILE = "@file"
FROM_COLUMN = "@column"
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
LONGEST_LABEL = 1000
"""In characters. Labels are repeated for every token; a longer one is probably a text in the wrong column."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelParts:
    """A label's parts, in order."""

    literals: tuple[str, ...]
    """The text before each field, and that after the last one."""
    fields: tuple[str, ...]
    """Columns, and parts of the path (with `@`)."""

    @property
    def meanings(self) -> dict[str, str]:
        """Maps a meaning, `label`, `label 2` …, to each field that is a column."""
        return {meaning_of(number): field for number, field in enumerate(self.fields) if field[0] != "@"}


@functools.lru_cache(maxsize=64)
def parse(spec: str) -> LabelParts:
    """Takes a value of `--label-column` apart.

    Raises:
        ValueError: its braces do not match, or a part of the path is not one of those that there are.
    """
    if not spec:
        raise ValueError("--label-column needs the name of a column, or @file, @folder, @path:REGEX")
    literals, fields = [""], []
    if spec[0] == "@" or "{" not in spec:
        literals, fields = ["", ""], [spec]
    else:
        try:
            for literal, field, rest, _ in string.Formatter().parse(spec):
                literals[-1] += literal
                if field is not None:
                    fields.append(f"{field}:{rest}" if rest else field)
                    literals.append("")
        except ValueError as error:
            raise ValueError(f"--label-column {spec}: {error}; write {{column}}_{{column}}") from error
    if not fields or not all(fields):
        raise ValueError(f"--label-column {spec} names no column; write {{column}}_{{column}}")
    for field in fields:
        if field[0] == "@" and not re.fullmatch(r"@file|@column|@folder(:[1-9]\d*)?|@path:.+", field):
            raise ValueError(f"--label-column {field}: of a path there are @file, @folder, @folder:2 and @path:REGEX")
    return LabelParts(literals=tuple(literals), fields=tuple(fields))


def of_path(field: str, location: str) -> tuple[str, str]:
    """Returns what a part of the path (`@…`) is, and what precedes it in the path.

    Raises:
        ValueError: the path has no such part.
    """
    folders = location.split("/")[:-1]
    name, _, rest = field.partition(":")
    if name == FROM_FILE:
        return file_name(location).name.split(".")[0], "/".join(folders)
    if name == "@folder":
        number = int(rest or 1)
        if number > len(folders) or not folders[-number]:
            raise ValueError(f"--label-column {field}: {location} lies in {len(folders) - 1} folders")
        return folders[-number], "/".join(folders[:-number])
    try:
        found = re.search(rest, location)
    except re.error as error:
        raise ValueError(f"--label-column {field}: {rest!r} is no regular expression: {error}") from error
    if found is None or not found.groups() or not found[1]:
        raise ValueError(f"--label-column {field}: its first group (…) finds nothing in {location}")
    return found[1], ""


def hive_columns(location: str) -> dict[str, str]:
    """Returns the columns that folders called KEY=VALUE give to the files in them."""
    pairs = (folder.partition("=") for folder in location.split("/")[:-1])
    return {unquote(key): unquote(value) for key, equals, value in pairs if key and equals and value != _HIVE_NULL}


def label_of(parts: LabelParts, fields: Mapping[str, Any]) -> tuple[str | None, str]:
    """Puts a document's label together.

    Args:
        parts: of the label.
        fields: their values, by meaning.

    Returns:
        The label, several of them sorted and joined by `LABEL_SEPARATOR`; or None and one of `formats.REASONS`.
    """
    if len(parts.fields) == 1 and parts.literals == ("", ""):
        value = fields.get("label")
        labels = value if isinstance(value, (list, tuple)) else [value]
        labels = [label for label in labels if not _is_missing(label)]
    else:
        values = [fields.get(meaning_of(number)) for number in range(len(parts.fields))]
        if any(_is_missing(value) for value in values):
            return None, "no label"
        if any(isinstance(value, (list, dict, bytes)) for value in values):
            return None, "label is not a string or number"
        labels = ["".join(_interleave(parts.literals, map(as_text, values)))]
    return _joined(labels)


def _joined(labels: list[Any]) -> tuple[str | None, str]:
    if any(isinstance(label, (list, dict, bytes)) for label in labels):
        return None, "label is not a string or number"
    texts = sorted({as_text(label) for label in labels})
    if not texts or any(text.isspace() or not text for text in texts):
        return None, "no label"
    if any(LABEL_SEPARATOR in text for text in texts):
        return None, f"label contains {LABEL_SEPARATOR}"
    if any(len(text) > LONGEST_LABEL for text in texts):
        return None, "label too long"
    return LABEL_SEPARATOR.join(texts), ""


def meaning_of(number: int) -> str:
    """Returns the meaning under which a row holds the label's part of this number, from 0."""
    return f"label {number + 1}" if number else "label"


def _interleave(literals: tuple[str, ...], values: Iterator[str]) -> Iterator[str]:
    yield literals[0]
    for value, literal in zip(values, literals[1:], strict=True):
        yield value
        yield literal


def _is_missing(value: Any) -> bool:
    # pandas writes NaN for a missing value.
    return value is None or (isinstance(value, float) and math.isnan(value))


def as_text(value: Any) -> str:
    """Returns a scalar as text; a whole number without the `.0` that a column with gaps gives it."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
