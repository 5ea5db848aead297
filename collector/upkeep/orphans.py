"""What a run directory holds that counts for nothing: parts without a commit record, old rollups, leftovers of writes.

They come from replicas that died between publishing and committing, from records that were set aside, from shards that
were committed after a rollup was made, and from processes killed while writing. Readers never see them; they only take
room.

Guarantees: what a commit record names stays, whatever its age, and so do the current rollup and everything younger
than the limit. Nothing is removed where a record cannot be read, because what it names is not known. On object stores
the parts of uploads that were cut are out of sight: a lifecycle rule of the bucket removes those.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

from collector.query.rollup.files import Covered
from collector.store.run_directory import PART_FOLDERS, PLAN, ROLLUP

if TYPE_CHECKING:
    from collector.store.run_directory import Entry, RunDirectory

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
LEAST_AGE = 3600
"""Seconds. Between a shard's first part and its commit record lie the uploads of the others, with their retries."""


def parse_age(text: str) -> float:
    """`30m`, `12h`, `1d` or `0` -> seconds.

    Raises:
        ValueError: it is no duration, or one that a shard may need between its parts and its commit.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text.strip())
    if match is None and text.strip() != "0":
        raise ValueError(f"--older-than takes a number with a unit (90m, 12h, 1d, 2w), or 0, got {text!r}")
    age = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    if 0 < age < LEAST_AGE:
        raise ValueError(
            f"--older-than {text} is less than an hour: a shard that is being collected may wait so long for its "
            "commit. Take 1h or more; 0 if nothing is writing to the run"
        )
    return age


def find(run: RunDirectory, older_than: float) -> list[Entry]:
    """The orphans of a run, by name.

    Args:
        run: the run directory.
        older_than: seconds since they were last written, by the clocks of this machine and of the store.

    Raises:
        FileNotFoundError: there is no run.
        DamagedRecordError: a commit record cannot be read.
    """
    if run.read_or_none(PLAN) is None:
        raise FileNotFoundError(f"no run at {run.root}: there is no {PLAN}")
    # Files first, records second: a part that is committed in between is then in both and stays. The other way round
    # its record would be missed, and committed data removed. A part that is listed here and committed only after the
    # records were read is younger than any age limit but 0.
    now = time.time()
    found = [entry for folder in (*PART_FOLDERS, ROLLUP) for entry in run.store.entries(folder)]
    found += run.store.litter()
    kept, covered = set(), Covered()
    for record in run.records():
        covered.add(record)
        kept |= {part.path for part in record.files.values()}
    kept |= set(covered.names().values())
    return sorted(
        (each for each in found if each.name not in kept and now - each.modified >= older_than),
        key=lambda each: each.name,
    )


def remove(run: RunDirectory, orphans: list[Entry]) -> None:
    """Deletes what `find` found."""
    for entry in orphans:
        run.store.delete(entry.name)
