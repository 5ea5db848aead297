"""Finds the wanted columns in a file, by name or by a dotted path into nested values.

`metadata.lang` is the column of that name or, where there is none, `lang` inside `metadata`. A column with dots in its
name wins over a path, and so does the longer name.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

LONGEST_LIST = 40
"""Names in a message."""
FLAGS = {"parallel_id": "--parallel-column", "source": "--data"}
"""Meaning -> the flag that names its column, where it is not `--MEANING-column`."""


def flag(meaning: str) -> str:
    """Returns the flag that names the column of a meaning: `--label-column` of `label` and of `label 2`."""
    first = meaning.partition(" ")[0]
    return FLAGS.get(first, f"--{first}-column")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """The wanted columns of a source."""

    wanted: tuple[tuple[str, str], ...]
    """Pairs of a meaning (`text`, `label` …) and the name, or dotted path, of its column."""
    required: frozenset[str] = frozenset()
    """The meanings that a file must have."""

    @classmethod
    def of(cls, required: Mapping[str, str], optional: Mapping[str, str] | None = None) -> Columns:
        """Takes names by meaning: of columns that a file must have, and of those that it may have."""
        return cls(wanted=(*required.items(), *(optional or {}).items()), required=frozenset(required))

    @functools.cached_property
    def paths(self) -> tuple[tuple[str, str], ...]:
        """Those of the wanted columns whose names may be paths."""
        return tuple((meaning, name) for meaning, name in self.wanted if "." in name)

    @property
    def positional(self) -> bool:
        """Whether columns of a CSV or TSV file are addressed by position, in a file without a header."""
        return dict(self.wanted)["text"].isdecimal()

    def find(self, names: Sequence[str], where: str) -> dict[str, str]:
        """Maps meaning to name, for the wanted columns that the source has.

        Args:
            names: of all columns; dotted ones of nested values.
            where: location of the source, for messages.

        Raises:
            ValueError: a required column is missing, or a column occurs several times.
        """
        found = {meaning: name for meaning, name in self.wanted if name in names}
        for meaning, name in self.wanted:
            if meaning in self.required and meaning not in found:
                have = f"{', '.join(names[:LONGEST_LIST]) or 'none'}{' …' if len(names) > LONGEST_LIST else ''}"
                remedy = flag(meaning) + (", or @file" if meaning.startswith("label") else "")
                raise ValueError(f"{where} has no column {name!r}; it has {have}: set {remedy}")
        for name in found.values():
            if (times := list(names).count(name)) > 1:
                raise ValueError(f"{where} has {times} columns {name!r}: rename all but one")
        return found


def dig(value: Any, path: str) -> tuple[Any, bool]:
    """Returns the value at a dotted path in nested dictionaries, and whether there is one."""
    if not isinstance(value, dict):
        return None, False
    if path in value:
        return value[path], True
    for head, rest in _splits(path):
        if head in value:
            return dig(value[head], rest)
    return None, False


def top_level(path: str, names: Sequence[str]) -> tuple[str, str]:
    """Splits a dotted path into one of the columns' names and the path inside it, empty for the column itself.

    Raises:
        ValueError: no column has such a name.
    """
    if path in names:
        return path, ""
    for head, rest in _splits(path):
        if head in names:
            return head, rest
    raise ValueError(f"no column {path!r}")


def _splits(path: str) -> Iterator[tuple[str, str]]:
    """Yields a path cut in two at each of its dots, the longest first part first."""
    head = path
    while "." in head:
        head = head.rpartition(".")[0]
        yield head, path[len(head) + 1 :]


def nested_names(value: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """Yields the names of all keys of nested dictionaries, those inside others as dotted paths."""
    for name, inner in value.items():
        yield f"{before}{name}"
        if isinstance(inner, dict):
            yield from nested_names(inner, f"{before}{name}.")


def schema_names(schema: Any) -> list[str]:
    """Returns the names of an Arrow schema's columns, those inside structs as dotted paths."""
    return [name for field in schema for name in _field_names(field, "")]


def _field_names(field: Any, before: str) -> Iterator[str]:
    import pyarrow as pa

    name = f"{before}{field.name}"
    yield name
    if pa.types.is_struct(field.type):
        for inner in field.type:
            yield from _field_names(inner, f"{name}.")


def class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Returns the names of the classes of each ClassLabel column that `datasets` described in a schema's metadata."""
    import json

    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return dict(_classes(features, ""))
    except (ValueError, TypeError, KeyError, AttributeError):  # written by another program
        return {}


def _classes(features: Mapping[str, Any], before: str) -> Iterator[tuple[str, list[str]]]:
    for name, feature in features.items():
        # A list of a feature is written with the feature inside it.
        while isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
            feature = feature["feature"]
        feature = feature[0] if isinstance(feature, list) and feature else feature
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
            yield f"{before}{name}", list(map(str, feature["names"]))
        elif isinstance(feature, dict) and "_type" not in feature:
            yield from _classes(feature, f"{before}{name}.")
