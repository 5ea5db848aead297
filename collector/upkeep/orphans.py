"""Finds and removes the orphans of a run: parts without a commit record, old rollups, leftovers of writes.

They come from replicas that died between publishing and committing, from records that were set aside, from shards that
were committed after a rollup was made, and from processes killed while writing. Readers never see them; they only take
space.

Guarantees: files named by a commit record stay, whatever their age, and so do the current rollup and everything younger
than the limit. If a record cannot be read, nothing is removed, because the files that it names are unknown. Incomplete
multipart uploads to object stores cannot be seen here: a lifecycle rule of the bucket removes those.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

from collector.query.rollup.files import Covered
from collector.store.run_directory import PART_FOLDERS, PLAN, ROLLUP
from collector.store.sweep_directory import hint as sweep_hint

if TYPE_CHECKING:
    from collector.store.run_directory import Entry, RunDirectory

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
LEAST_AGE = 3600
"""Seconds. A shard's other parts are uploaded, with retries, between its first part and its commit record."""


def parse_age(text: str) -> float:
    """Parses `90m`, `12h`, `1d` or `0` into seconds.

    Raises:
        ValueError: the text is not a duration, or so short that a shard may take as long to commit its parts.
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
    """Returns the orphans of a run, sorted by name.

    Args:
        run: the run directory.
        older_than: minimum seconds since they were last written, by the clocks of this machine and of the store.

    Raises:
        FileNotFoundError: there is no run.
        DamagedRecordError: a commit record cannot be read.
    """
    if run.read_or_none(PLAN) is None:
        raise FileNotFoundError(f"no run at {run.root}: {sweep_hint(run.root) or f'there is no {PLAN}'}")
    # Files first, records second: a part committed in between is then in both lists and stays. In the other order its
    # record would be missed, and committed data removed. A part that is listed here and committed only after the
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
    """Deletes the given files."""
    for entry in orphans:
        run.store.delete(entry.name)
