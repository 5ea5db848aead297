"""Checks the run's own files, commit records and parts: that they exist, belong to this plan and have the right bytes.

`tables` and `routing` check the contents of the tables.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from collector.data.plan import Plan
from collector.store import manifest
from collector.store.run_directory import (
    MANIFEST,
    PLAN,
    REJECTS,
    RUN,
    SUCCESS,
    VOCAB,
    Commit,
    DamagedRecordError,
    RunDirectory,
    sha256_of,
)
from collector.store.sweep_directory import hint as sweep_hint
from collector.upkeep.verify import tables
from collector.upkeep.verify.reading import Card
from collector.upkeep.verify.report import Report
from collector.upkeep.verify.rollup import RollupCheck, open_rollup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from collector.data.plan import Shard

_IN_WORK = min(4, os.cpu_count() or 1)
_WINDOW = 256


def verify(run: RunDirectory, progress: Callable[[int, int], None] = lambda _done, _all: None) -> Report:
    """Checks a run.

    Args:
        run: the run directory.
        progress: called after each shard with the number of shards done and the total.

    Raises:
        FileNotFoundError: there is no run.
        StoreError: the object store does not answer.
    """
    stored = run.read_or_none(PLAN)
    if stored is None:
        raise FileNotFoundError(f"no run at {run.root}: {sweep_hint(run.root) or f'there is no {PLAN}'}")
    try:
        plan = Plan.from_parquet(stored)
    except (ValueError, KeyError, TypeError, OSError) as error:
        return Report(shards=0, run=[f"{PLAN} cannot be read, and only a copy helps: {_first_line(error)}"])
    committed = run.committed_shards()
    planned = {shard.shard: shard for shard in plan.shards}
    report = Report(shards=len(planned), missing=sorted(planned.keys() - committed))
    report.wrong = {shard: ["the plan has no such shard"] for shard in committed - planned.keys()}
    card = _check_card(run, plan, report, needed=bool(committed))
    if card is not None:
        there = [planned[shard] for shard in sorted(committed & planned.keys())]
        with open_rollup(run) as rollup:
            _check_shards(run, there, plan, card, report, progress, rollup)
            if rollup is not None and not report.wrong:
                report.rollup = rollup.finish()
    _check_marks(run, plan, report)
    report.empty = bool(committed) and report.sound and not any(commit.documents for commit in run.commits())
    return report


def recollect(run: RunDirectory, report: Report) -> list[str]:
    """Sets the commit records of wrong shards aside, so that the same collect command collects them again.

    The marks of completeness are removed first. If this is killed at any moment, verify and collect can still handle
    the run, and it is never marked complete while a shard is missing.

    Returns:
        The new names of the records.
    """
    run.reopen()
    aside = [run.set_aside(shard) for shard in sorted(report.wrong)]
    run.reopen()  # meanwhile a driver that saw every shard committed may have restored the marks
    return aside


# ---- the run's own files ----


def _check_card(run: RunDirectory, plan: Plan, report: Report, *, needed: bool) -> Card | None:
    stored = run.read_or_none(RUN)
    if stored is None:
        if needed:
            report.run.append(f"{RUN} is missing, although shards are committed")
        return None
    try:
        info = json.loads(stored)
        card = Card.of(info)
        if info["plan_hash"] != plan.hash:
            report.run.append(f"{RUN} belongs to the plan {info['plan_hash']}, {PLAN} is {plan.hash}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        report.run.append(f"{RUN} cannot be read: {type(error).__name__}: {_first_line(error)}")
        return None
    if not card.drops_token_ids and needed:
        _check_vocabulary(run, report)
    return card


def _check_vocabulary(run: RunDirectory, report: Report) -> None:
    stored = run.read_or_none(VOCAB)
    try:
        if stored is not None:
            pq.read_table(io.BytesIO(stored), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        report.run.append(f"{VOCAB} cannot be read; delete it and collect again: {_first_line(error)}")


def _check_marks(run: RunDirectory, plan: Plan, report: Report) -> None:
    """Checks that `_SUCCESS` and the manifest match exactly this plan and these records."""
    success, stored = run.read_or_none(SUCCESS), run.read_or_none(MANIFEST)
    if success is None:
        return
    if report.missing:
        report.run.append(f"{SUCCESS} is there, although {len(report.missing):,} shards are not committed")
    try:
        mark = json.loads(success)
        said = mark["plan_hash"], mark["shards"], mark["manifest"]
    except (ValueError, KeyError, TypeError):
        report.run.append(f"{SUCCESS} cannot be read, or names no manifest")
        return
    if said[:2] != (plan.hash, len(plan.shards)):
        report.run.append(f"{SUCCESS} belongs to another plan: {said[1]} shards, {said[0]}")
    if stored is None or hashlib.sha256(stored).hexdigest() != said[2]:
        report.run.append(f"{MANIFEST} is {'missing' if stored is None else 'not the one that _SUCCESS names'}")
    elif not report.wrong and not _lists_the_records(stored, run):
        report.run.append(f"{MANIFEST} differs from the commit records")


def _lists_the_records(stored: bytes, run: RunDirectory) -> bool:
    try:
        return list(manifest.decode(stored)) == list(run.records())
    except DamagedRecordError:
        return False


# ---- shards ----


def _check_shards(
    run: RunDirectory, shards: list[Shard], plan: Plan, card: Card, report: Report,
    progress: Callable[[int, int], None], rollup: RollupCheck | None,
) -> None:  # fmt: skip
    with ThreadPoolExecutor(_IN_WORK) as pool:
        for first in range(0, len(shards), _WINDOW):
            window = shards[first : first + _WINDOW]
            found = pool.map(lambda shard: _check_shard(run, shard, plan.hash, card, rollup), window)
            for done, (shard, wrong) in enumerate(zip(window, found, strict=True), first + 1):
                if wrong:
                    report.wrong[shard.shard] = wrong
                progress(done, len(shards))


def _check_shard(
    run: RunDirectory, shard: Shard, plan_hash: str, card: Card, rollup: RollupCheck | None
) -> list[str]:  # fmt: skip
    try:
        commit = run.read_commit(shard.shard)
    except DamagedRecordError as error:
        return [f"its commit record is damaged ({_first_line(error.__cause__ or error)})"]
    if commit is None:
        return ["its commit record has disappeared"]
    wrong = list(_check_record(commit, shard, plan_hash, card))
    with tempfile.TemporaryDirectory(prefix="collector-verify-") as folder:
        paths: dict[str, Path] = {}
        for table in commit.files:
            wrong += _check_part(run, commit, table, Path(folder), paths)
        if not wrong:
            try:
                wrong += tables.problems(paths, commit, card)
            except (pa.ArrowException, OSError, ValueError) as error:
                wrong.append(f"its tables cannot be read: {type(error).__name__}: {_first_line(error)}")
        if not wrong and rollup is not None:
            rollup.check_shard(shard.shard, paths)
    return wrong


def _check_record(commit: Commit, shard: Shard, plan_hash: str, card: Card) -> Iterator[str]:
    """Checks that the record belongs to this shard of this plan, and accounts for every row of it."""
    if commit.shard != shard.shard:
        yield f"its commit record is that of shard {commit.shard}"
    if commit.plan_hash != plan_hash:
        yield f"its commit record belongs to another plan ({commit.plan_hash})"
    if set(commit.files) - {REJECTS} != card.schemas.keys() - {REJECTS}:
        yield f"its commit record names the tables {', '.join(sorted(commit.files))}"
    skipped = sum(each.count for each in commit.skipped.values())
    if commit.documents + skipped != shard.planned:
        yield f"{commit.documents:,} documents and {skipped:,} skipped rows of {shard.planned:,} planned rows"
    promised = {"tokens": commit.tokens, "documents": commit.documents, REJECTS: skipped}
    found = {table: part.rows for table, part in commit.files.items()}
    recorded = found.keys() - promised.keys()
    promised[" and ".join(sorted(recorded))] = commit.rows
    found[" and ".join(sorted(recorded))] = sum(found[table] for table in recorded)
    for table, rows in promised.items():
        if rows != found.get(table, rows):
            yield f"its commit record says {rows:,} and {found[table]:,} rows of {table}"


def _check_part(run: RunDirectory, commit: Commit, table: str, folder: Path, paths: dict[str, Path]) -> Iterator[str]:
    """Checks that the file is the committed one, byte for byte, and puts it into `paths`."""
    part = commit.files[table]
    try:
        path = paths[table] = run.store.local_copy(part.path, folder)
    except FileNotFoundError:
        yield f"{part.path} is missing"
        return
    if path.stat().st_size != part.bytes:
        yield f"{part.path} has {path.stat().st_size:,} bytes instead of {part.bytes:,}"
    elif sha256_of(path) != part.sha256:
        yield f"{part.path} has another SHA-256 than was committed"
    else:
        try:
            rows = pq.read_metadata(path).num_rows
        except (pa.ArrowException, OSError) as error:
            yield f"{part.path} is no Parquet file: {_first_line(error)}"
            return
        if rows != part.rows:
            yield f"{part.path} has {rows:,} rows instead of {part.rows:,}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
