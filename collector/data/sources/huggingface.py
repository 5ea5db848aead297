"""Reads sources of the library `datasets`: hub datasets as lists of files, and saved folders.

`hf:NAME[:CONFIG][:SPLIT]` is resolved to the data files of that split, pinned to a commit of the hub;
they are then read by range like any other file, never downloaded whole. NAME may also be a local
folder of data files. A folder written by `Dataset.save_to_disk` is memory-mapped and can be read
from any row. No other module imports `datasets`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collector.data.formats import Format, Span, even_spans, table_rows
from collector.data.formats.columns import class_names, schema_names, top_level
from collector.data.sources.files import absolute
from collector.data.sources.kinds import COMPRESSIONS, KINDS, file_name, is_known

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

PREFIX = "hf:"
DEFAULT_SPLIT = "train"
_BATCH = 512
_OF_EVERY_BUILDER = {"name", "version", "data_dir", "data_files", "description", "features", "chunksize", "columns"}
"""Fields of a builder's config that do not change how rows are read."""


def is_hub_spec(spec: str) -> bool:
    """Whether a specification is `hf:…`, rather than a file (hf:// also denotes a file)."""
    return spec.startswith(PREFIX) and not spec.startswith("hf://")


def parse(spec: str) -> tuple[str, list[str]]:
    """Returns the name or local folder, and up to two options (config, split).

    Raises:
        ValueError: there are more parts.
    """
    parts = spec.removeprefix(PREFIX).split(":")
    # A folder's name may contain colons, so the longest existing folder wins.
    for count in range(len(parts), 0, -1):
        folder = absolute(":".join(parts[:count]))
        if parts[0] and Path(folder).is_dir():
            return folder, _options(spec, parts[count:])
    return parts[0], _options(spec, parts[1:])


def _options(spec: str, options: list[str]) -> list[str]:
    if len(options) > 2:
        raise ValueError(f"--data {spec}: write hf:NAME, hf:NAME:CONFIG, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    return options


def list_split(spec: str) -> list[tuple[str, dict[str, Any]]]:
    """Returns the absolute data files of `hf:NAME[:CONFIG][:SPLIT]`; a single option is a config if one has that name.

    Returns:
        Each file with the options that the data card gives: see `Source.options`.

    Raises:
        ValueError: there is no such dataset, config or split, its files are of an unknown kind, or its card wants them
            read in a way that is not known here.
    """
    import datasets

    name, options = parse(spec)
    try:
        configs = datasets.get_dataset_config_names(name)
        if len(options) == 1:
            options = [*options, ""] if options[0] in configs else ["", *options]
        config, split = options or ("", "")
        builder = datasets.load_dataset_builder(name, config or None)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"--data {spec}: {error}") from error
    splits = {str(key): list(files) for key, files in (builder.config.data_files or {}).items()}
    told = _options_of(spec, builder)
    return [(file, told) for file in _files_of(spec, splits, split or DEFAULT_SPLIT, configs)]


def _options_of(spec: str, builder: Any) -> dict[str, Any]:
    """Returns what a data card says of how to read its files: separator, field, and names of classes.

    Raises:
        ValueError: it sets a parameter of the builder that is not known here.
    """
    import datasets

    set_by_card = {
        field.name: value
        for field in dataclasses.fields(builder.config)
        if field.name not in _OF_EVERY_BUILDER and (value := getattr(builder.config, field.name)) != _default(field)
    }
    separators = [set_by_card.pop(name) for name in ("sep", "delimiter") if name in set_by_card]
    options = {"sep": separators[-1]} if separators and separators[-1] != "," else {}
    if (field := set_by_card.pop("field", None)) is not None:
        options["field"] = field
    if len(options.get("sep", ",")) != 1 or not options.get("sep", ",").isascii():
        raise ValueError(
            f"--data {spec}: its data card separates columns by {options['sep']!r}; one ASCII character can be"
        )
    if set_by_card:
        told = ", ".join(f"{name}: {value}" for name, value in sorted(set_by_card.items()))
        raise ValueError(
            f"--data {spec}: its data card reads the files with {told}, which is not known here: load it with "
            "datasets, and give the folder that save_to_disk writes"
        )
    names = {
        name: list(feature.names)
        for name, feature in (builder.info.features or {}).items()
        if isinstance(feature, datasets.ClassLabel)
    }
    return options | ({"names": names} if names else {})


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _files_of(spec: str, splits: Mapping[str, list[str]], split: str, configs: list[str]) -> list[str]:
    if split not in splits:
        have = f"splits {', '.join(splits) or 'none'}; configs {', '.join(configs)}"
        raise ValueError(f"--data {spec}: no split {split!r}; there are {have}: hf:NAME[:CONFIG][:SPLIT]")
    unknown = sorted({"".join(file_name(file).suffixes) for file in splits[split] if not is_known(file)})
    if unknown:
        known = f"{' '.join(KINDS)}, and text files as {' or '.join(COMPRESSIONS)},"
        raise ValueError(f"--data {spec} holds {' '.join(unknown)} files; {known} can be read: convert them")
    return [absolute(file) for file in splits[split]]


def is_saved(folder: str) -> bool:
    """Whether a folder was written by `Dataset.save_to_disk`.

    Raises:
        ValueError: the folder holds several splits.
    """
    several = Path(folder) / "dataset_dict.json"
    splits = sorted(path.parent.name for path in Path(folder).glob("*/state.json"))
    if several.is_file() and splits:
        raise ValueError(
            f"--data {folder} holds the splits {', '.join(splits)}: give one, such as {folder}/{splits[0]}"
        )
    return (Path(folder) / "state.json").is_file()


def saved_fingerprint(folder: str) -> str:
    """Returns a string that changes when the folder is rewritten; `datasets` keeps a fingerprint in state.json."""
    files = sorted(Path(folder).glob("*.arrow"))
    state = (Path(folder) / "state.json").read_text(encoding="utf-8")
    listing = "\n".join([*(f"{file.name} {file.stat().st_size}" for file in files), state])
    return f"files:{len(files)}-sha256:{hashlib.sha256(listing.encode()).hexdigest()}"


@functools.lru_cache(maxsize=8)
def _load(folder: str, written: int) -> Any:  # noqa: ARG001 (part of the cache key: a rewritten folder is reloaded)
    import datasets

    return datasets.load_from_disk(folder).with_format("arrow")


class Saved(Format):
    """A folder written by `Dataset.save_to_disk`."""

    def _dataset(self) -> Any:
        return _load(self.where, (Path(self.where) / "state.json").stat().st_mtime_ns)

    def locate(self, every: int) -> Iterator[Span]:
        """See `Format.locate`.

        Raises:
            ValueError: a column is missing.
        """
        self.columns.find(self.names(), self.where)
        return even_spans(len(self._dataset()), every)

    def names(self) -> list[str]:
        """See `Format.names`."""
        return schema_names(self._dataset().features.arrow_schema)

    def classes(self) -> Mapping[str, Sequence[str]]:
        """See `Format.classes`."""
        return class_names(self._dataset().features.arrow_schema.metadata)

    def read(self, span: Span, keep: Collection[int] | None) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
        """See `Format.read`."""
        dataset = self._dataset()
        names = self.columns.find(self.names(), self.where)
        wanted = dataset.select_columns(sorted({top_level(name, dataset.column_names)[0] for name in names.values()}))
        rows = range(span.first_row, span.first_row + span.rows)
        for first in range(rows.start, rows.stop, _BATCH):
            batch = range(first, min(first + _BATCH, rows.stop))
            if keep is None or any(row in keep for row in batch):
                for row, fields in zip(batch, table_rows(wanted[batch.start : batch.stop], names), strict=True):
                    if keep is None or row in keep:
                        yield row, fields
