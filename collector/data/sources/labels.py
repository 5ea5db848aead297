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

from collector.data.sources.kinds import file_name

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

    @functools.cached_property
    def is_single(self) -> bool:
        """Whether the label is one field with nothing around it."""
        return len(self.fields) == 1 and self.literals == ("", "")

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


class UnusableError(Exception):
    """No document can be made of a row. The message is one of `formats.REASONS`."""


def label_of(parts: LabelParts, fields: Mapping[str, Any]) -> str:
    """Puts a document's label together; several labels are sorted and joined by `LABEL_SEPARATOR`.

    Args:
        parts: of the label.
        fields: their values, by meaning.

    Raises:
        UnusableError: there is no usable label.
    """
    if parts.is_single:
        value = fields.get("label")
        if isinstance(value, str):
            return _checked(value)
        labels = value if isinstance(value, (list, tuple)) else [value]
        texts = sorted({_scalar_text(label) for label in labels if not _is_missing(label)})
    else:
        values = [fields.get(meaning_of(number)) for number in range(len(parts.fields))]
        has_all = not any(map(_is_missing, values))
        texts = ["".join(_interleave(parts.literals, map(_scalar_text, values)))] if has_all else []
    if not texts:
        raise UnusableError("no label")
    return LABEL_SEPARATOR.join(map(_checked, texts))


def _scalar_text(value: Any) -> str:
    if isinstance(value, (list, dict, bytes)):
        raise UnusableError("label is not a string or number")
    return as_text(value)


def _checked(label: str) -> str:
    """Returns a text if it is usable as a single label."""
    if not label or label.isspace():
        raise UnusableError("no label")
    if LABEL_SEPARATOR in label:
        raise UnusableError(f"label contains {LABEL_SEPARATOR}")
    if len(label) > LONGEST_LABEL:
        raise UnusableError("label too long")
    return label


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
