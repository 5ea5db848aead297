"""Decides which columns and which parts of the path a source's documents are made of."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

from collector.config import DataConfig
from collector.data.formats import Columns
from collector.data.sources import labels
from collector.data.sources.labels import FROM_COLUMN, FROM_FILE, LabelParts

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from collector.data.sources.source import Source

_DEFAULT = DataConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Meaning:
    """What a source's rows mean."""

    columns: Columns
    label: LabelParts
    column: str
    """What tells this text of a wide row from the others; empty if a row is one text."""
    constants: Mapping[str, str]
    """Values that the path gives, by meaning, for rows that have none of their own."""
    classes: Mapping[str, Sequence[str]]
    """Names of classes, by meaning, where rows hold numbers."""

    @classmethod
    def of(cls, source: Source, data: DataConfig) -> Meaning:
        """Reads nothing but the source's path and options.

        Raises:
            ValueError: the path has no such part, or a target column is requested from a source without columns.
        """
        if data.target_column is not None and source.format in ("txt", "demo"):
            raise ValueError(f"{source.location} has texts alone, so there is no column for --target-column")
        hive = labels.hive_columns(source.location) if source.is_file else {}
        column = str(source.options.get("column", ""))
        label = labels.parse(_label_spec(source, data, hive))
        named = {
            "text": source.options.get("text", data.text_column),
            **label.meanings,
            "id": data.id_column,
            "parallel_id": data.parallel_column,
            "source": "source",
        }
        given = {"target": data.target_column, "spans": data.spans_column}
        named |= {meaning: name for meaning, name in given.items() if name is not None}
        required = {"text", "target", "spans", *label.meanings}
        required |= {"id"} if data.id_column != _DEFAULT.id_column else set()
        required |= {"parallel_id"} if data.parallel_column != _DEFAULT.parallel_column else set()
        of_path = {meaning: hive[name] for meaning, name in named.items() if name in hive}
        of_path |= {
            labels.meaning_of(number): column if field == FROM_COLUMN else labels.of_path(field, source.location)[0]
            for number, field in enumerate(label.fields)
            if field[0] == "@"
        }
        names = source.options.get("names", {})
        return cls(
            columns=Columns(wanted=tuple(named.items()), required=frozenset(required & named.keys() - of_path.keys())),
            label=label,
            column=column,
            constants=of_path,
            classes={meaning: names[name] for meaning, name in named.items() if name in names},
        )

    def complete(self, fields: Mapping[str, Any] | str) -> Mapping[str, Any] | str:
        """Adds what the path gives, and names classes; the reason why a row is unusable stays as it is."""
        if isinstance(fields, str) or not (self.constants or self.classes):
            return fields
        full = {**self.constants, **fields}
        return full | {
            meaning: _class_name(full[meaning], names) for meaning, names in self.classes.items() if meaning in full
        }


def _label_spec(source: Source, data: DataConfig, hive: Mapping[str, str]) -> str:
    """Returns what the label of a source is made of, where that is not what `--label-column` says."""
    spec = data.label_column
    if source.format == "demo":
        return _DEFAULT.label_column
    if "column" in source.options and spec == _DEFAULT.label_column:
        return FROM_COLUMN
    # Plain text has no columns.
    if source.format == "txt" and not all(name in hive for name in labels.parse(spec).meanings.values()):
        return FROM_FILE
    return spec


def _class_name(value: Any, names: Sequence[str]) -> Any:
    """Returns the name of a class by its number, of several in a list; -1 stands for none."""
    if isinstance(value, (list, tuple)):
        return [_class_name(one, names) for one in value]
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value >= len(names):
        return value
    return names[value] if value >= 0 else None


def is_wide(text_column: str) -> bool:
    """Whether a value of `--text-column` may name several columns, each with a text of its own."""
    return "*" in text_column or "," in text_column


def wide_columns(text_column: str, names: Sequence[str], where: str) -> dict[str, str]:
    """Returns the columns that a value of `--text-column` names, each with what tells it from the others.

    That is the part that `*` stands for, or of a list the column's own name.

    Raises:
        ValueError: there is no such column.
    """
    found: dict[str, str] = {}
    for name in map(str.strip, text_column.split(",")):
        pattern = re.compile("([^.]+)".join(map(re.escape, name.split("*"))))
        matches = [(each, pattern.fullmatch(each)) for each in names]
        here = {each: "*".join(match.groups()) or each for each, match in matches if match}
        if not here:
            have = ", ".join(names[:40]) or "none"
            raise ValueError(f"{where} has no column {name!r}; it has {have}: set --text-column")
        found |= here
    return found


def spread_labels(sources: Iterable[Source], data: DataConfig) -> dict[str, list[str]]:
    """Returns labels that the path gives to files in several places, with these places.

    `train` in `en/train.jsonl` and `ko/train.jsonl` is such a label, and probably not the one that was meant.
    """
    places: dict[str, dict[str, None]] = {}
    for source in sources:
        if source.format == "demo":
            continue
        label = labels.parse(_label_spec(source, data, labels.hive_columns(source.location)))
        if all(field[0] == "@" and field != FROM_COLUMN for field in label.fields):
            found = [labels.of_path(field, source.location) for field in label.fields]
            name = " ".join(value for value, _ in found)
            places.setdefault(name, {})[found[-1][1]] = None
    return {label: list(where) for label, where in places.items() if len(where) > 1}
