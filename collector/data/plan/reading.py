"""Reads the shards of a plan, and checks that sources and settings are still those of the plan."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from collector.config import DataConfig
from collector.data import sources
from collector.data.plan.making import in_order
from collector.data.sources import BadRow, Document, Source, Span

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from collector.config import RunConfig
    from collector.data.plan.frozen import Plan, Shard


_LONGEST = 300
"""Characters of a setting in a message."""
_DEFAULTS = dataclasses.asdict(DataConfig())


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Describes the differences between two sets of settings, one line each.

    A setting that an earlier version did not know differs if it is not at its default.
    """
    old = {**old, **{key: value for key, value in _DEFAULTS.items() if key in new and key not in old}}
    keys = [*old, *(key for key in new if key not in old)]
    pairs = [(f"--{key.replace('_', '-')}", _spoken(old.get(key)), _spoken(new.get(key))) for key in keys]
    return [f"{flag} was {was}, is now {now}" for flag, was, now in pairs if was != now]


def _spoken(value: Any) -> str:
    if value is None or value in ((), []):
        return "not given"
    said = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST]}…"


def check_sources(plan: Plan, config: RunConfig) -> list[str]:
    """Describes what changed in the sources since the plan was made; reads only both ends of each file.

    Hub datasets are left out: the plan pins them to one commit, which stays readable.
    """
    files = tuple(spec for spec in config.data.data if not sources.is_pinned(spec))
    try:
        found = sources.resolve(dataclasses.replace(config.data, data=files)) if files else []
    except ValueError as error:
        return [str(error)]
    now = {source.location: source for source in found}
    removed = [location for location in plan.sources if location not in now and not location.startswith("hf://")]
    planned = [source for source in found if plan.sources.get(source.location) is not None]
    changed = [
        source.location
        for source, fingerprint in in_order(sources.fingerprint, planned)
        if fingerprint != plan.sources[source.location]
    ]
    return [
        *(f"{location} is gone" for location in removed),
        *(f"{location} has been added" for location in now if location not in plan.sources),
        *(f"{location} has changed" for location in changed),
    ]


def _require_unchanged(source: Source, planned: str) -> None:
    """Raises if a source changed; called for every shard, because a file can change during a run."""
    now = sources.fingerprint(source)
    if now != planned:
        raise ValueError(
            f"source changed since the plan was made: {source.location} was {planned}, is {now}; "
            f"restore it, or start a new run"
        )


def read_shard(shard: Shard, data: DataConfig) -> Iterator[Document | BadRow]:
    """Yields the rows of a shard in the order of the source, each as a document or as a bad row with its reason.

    Raises:
        ValueError: the source has changed since the plan was made, or is damaged here (`DamagedError`).
    """
    options = json.loads(shard.options) if shard.options else {}
    source = Source(location=shard.source, name=shard.name, kind=shard.kind, options=options)
    _require_unchanged(source, shard.fingerprint)
    span = Span(first_row=shard.first_row, rows=shard.rows, offset=shard.offset)
    keep = None if shard.keep is None else frozenset(shard.keep)
    count = 0
    for _, document in sources.documents(source, data, span, keep, version=shard.fingerprint):
        count += 1
        yield document
    if count != shard.planned:
        raise ValueError(
            f"source changed since the plan was made: {shard.source} has {count} of the {shard.planned} rows "
            f"of shard {shard.shard}; restore it, or start a new run"
        )
