"""The run directory: publishes parts, and commits each shard exactly once.

    RUN/plan.parquet                            the frozen shards; its metadata holds config and hash
    RUN/run.json                                model, routers, versions
    RUN/vocab.parquet                           token ids as readable text
    RUN/data/<shard>-<attempt>.<table>.parquet  parts, each attempt under a name of its own
    RUN/rejects/…                               the same for the rows that became no document, where there are any
    RUN/commits/<shard>.json                    what makes an attempt's parts count
    RUN/failures/<shard>.json                   why a shard's last attempt failed
    RUN/replaced/<shard>-<attempt>.json         commit records that `collector verify --recollect` set aside
    RUN/weights/<model>.parquet                 how alike the experts' weights are, of `collector weights`
    RUN/rollup/<table>-<digest>.parquet         counts per document and per label, of exactly the commits of the digest
    RUN/views.sql, RUN/_MANIFEST.parquet        when every shard is committed: views; all commit records in one file
    RUN/_SUCCESS                                last of all; holds the manifest's hash

Guarantees: readers open only files that a commit record names, so a part without a record does not exist for them. Of
any number of attempts at a shard exactly one is committed. No method deletes what another attempt wrote, except
`set_aside`, which is asked to. A complete run is read from its manifest if the manifest has the hash in `_SUCCESS`, and
from the commit records otherwise.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collector.store import manifest
from collector.store.commits import Commit, DamagedRecordError, Part, Skipped
from collector.store.local_store import Entry, LocalStore, Store, StoreError
from collector.store.manifest import MANIFEST
from collector.store.object_store import ObjectStore

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = [
    "MANIFEST", "MAPS", "PART_FOLDERS", "PLAN", "REJECTS", "ROLLUP", "RUN", "SUCCESS", "TABLES", "VIEWS", "VOCAB",
    "WEIGHTS", "Commit", "DamagedRecordError", "Entry", "LocalStore", "ObjectStore", "Part", "RunDirectory",
    "Skipped", "Store", "StoreError", "sha256_of", "weights_name",
]  # fmt: skip

PLAN, RUN, VOCAB, VIEWS, SUCCESS = "plan.parquet", "run.json", "vocab.parquet", "views.sql", "_SUCCESS"
TABLES = ("tokens", "documents")
"""The tables of every run; the recorders add theirs."""
REJECTS = "rejects"
"""The table of rows that became no document; a shard without such rows has no part of it."""
PART_FOLDERS = ("data", REJECTS)
ROLLUP = "rollup"
"""The folder of the counts that `collector rollup` writes; see `query.rollup`."""
WEIGHTS = "weights"
"""The folder of what `collector weights` writes."""
MAPS = "maps"
"""The folder of what `collector map` writes."""
_READERS = 16
"""Records of an unfinished run that are read in parallel: on an object store each takes a round trip."""
_WINDOW = 1024


def _commit_name(shard: int) -> str:
    return f"commits/{shard:06d}.json"


def weights_name(info: Mapping[str, Any]) -> str:
    """The file of `collector weights` for the model of a run.json; empty if it does not tell which model that is."""
    fingerprint = info.get("model", {}).get("fingerprint", "")
    return fingerprint and f"{WEIGHTS}/{fingerprint[:16]}.parquet"


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class RunDirectory:
    """The files of a run on a store: plan, parts, commit records and failures."""

    def __init__(self, root: str | os.PathLike[str], store: Store | None = None) -> None:
        self.root = os.fspath(root)
        local = "://" not in self.root
        if local:
            self.root = str(Path(self.root).absolute())  # workers have another current folder
        self.store: Store = store or (LocalStore(Path(self.root)) if local else ObjectStore(self.root))

    def scratch(self) -> tempfile.TemporaryDirectory[str]:
        """A folder for files that are being written; it is removed when its context ends."""
        return tempfile.TemporaryDirectory(
            prefix="attempt-", dir=self.store.scratch_parent(), ignore_cleanup_errors=True
        )

    def read_or_none(self, name: str) -> bytes | None:
        """The content of a file, or None if there is none."""
        try:
            return self.store.read(name)
        except FileNotFoundError:
            return None

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the run; FileNotFoundError if there is none."""
        return json.loads(self.store.read(name))

    # ---- parts and commits ----

    def publish_part(self, scratch: Path, shard: int, attempt: str, table: str, rows: int) -> Part:
        """Publishes a finished file under a name that only this attempt uses."""
        folder = REJECTS if table == REJECTS else "data"
        name = f"{folder}/{shard:06d}-{attempt}.{table}.parquet"
        part = Part(path=name, rows=rows, bytes=scratch.stat().st_size, sha256=sha256_of(scratch))
        self.store.publish(scratch, name)
        return part

    def commit(self, record: Commit) -> Commit:
        """Commits an attempt, unless another attempt at the shard was first.

        Returns:
            The record that counts. If it is another attempt's, this attempt's parts are deleted.

        Raises:
            DamagedRecordError: there is a record that cannot be read.
        """
        name = _commit_name(record.shard)
        try:
            won = self.store.put_new(name, record.to_json())
        except Exception:
            # A store may fail to answer after the write happened: only the record itself can tell.
            if self.read_or_none(name) is None:
                raise
            won = False
        if won:
            return record
        winner = self._read_record(name)
        if winner.attempt != record.attempt:
            for part in record.files.values():
                self.store.delete(part.path)
        return winner

    def committed_shards(self) -> set[int]:
        """Numbers of the shards that have a commit record. Lists names, reads no record."""
        return set(self._record_names())

    def commits(self) -> Iterator[Commit]:
        """Yields all commit records in the order of their shards; a complete run's come from its manifest.

        Raises:
            DamagedRecordError: a record cannot be read.
        """
        complete = self._manifest()
        return self.records() if complete is None else manifest.decode(complete)

    def records(self) -> Iterator[Commit]:
        """Yields all commit records in the order of their shards, each from its own file.

        Raises:
            DamagedRecordError: a record cannot be read.
        """
        names = [name for _, name in sorted(self._record_names().items())]
        with ThreadPoolExecutor(_READERS) as pool:
            for first in range(0, len(names), _WINDOW):  # in windows: only so many are held at once
                for data, name in zip(pool.map(self.read_or_none, names[first : first + _WINDOW]), names[first:]):  # noqa: B905
                    if data is not None:  # it was there when the names were listed, and has been set aside since
                        yield self._parse(name, data)

    def read_commit(self, shard: int) -> Commit | None:
        """A shard's commit record; None if the shard is not committed.

        Raises:
            DamagedRecordError: it cannot be read.
        """
        name = _commit_name(shard)
        data = self.read_or_none(name)
        return None if data is None else self._parse(name, data)

    def set_aside(self, shard: int) -> str:
        """Moves a shard's commit record to `replaced/`, so that the shard is collected again; see `reopen`.

        If it is killed, the record is in at least one of the two places, and calling it again finishes the move.

        Returns:
            Where the record is now.
        """
        name = _commit_name(shard)
        data = self.store.read(name)
        try:
            attempt = self._parse(name, data).attempt
        except DamagedRecordError:
            attempt = f"damaged-{hashlib.sha256(data).hexdigest()[:12]}"
        aside = f"replaced/{shard:06d}-{attempt}.json"
        self.store.put(aside, data)
        self.store.delete(name)
        return aside

    def _record_names(self) -> dict[int, str]:
        found = ((re.fullmatch(r"commits/(\d+)\.json", name), name) for name in self.store.list("commits"))
        return {int(match[1]): name for match, name in found if match}

    def _read_record(self, name: str) -> Commit:
        return self._parse(name, self.store.read(name))

    def _parse(self, name: str, data: bytes) -> Commit:
        return Commit.from_json(data, self.store.location(name))

    # ---- complete runs ----

    def finish(self, plan_hash: str, shards: int) -> None:
        """Marks the run complete; every shard must be committed.

        Several drivers may do so at once; the first one's manifest stays if it holds the same records.

        Args:
            plan_hash: of the plan.
            shards: of the plan.

        Raises:
            ValueError: not every shard is committed, or a record cannot be read.
        """
        commits = list(self.records())
        if len(commits) != shards:
            raise ValueError(f"{self.root} holds {len(commits)} of {shards} commit records: it is not complete")
        data = manifest.encode(commits)
        if not self.store.put_new(MANIFEST, data):
            stored = self.store.read(MANIFEST)
            if _decoded(stored) == commits:
                data = stored
            else:
                self.store.put(MANIFEST, data)
        mark = {"plan_hash": plan_hash, "shards": shards, "manifest": hashlib.sha256(data).hexdigest()}
        content = json.dumps(mark).encode() + b"\n"
        if not self.store.put_new(SUCCESS, content) and self.store.read(SUCCESS) != content:
            self.store.put(SUCCESS, content)

    def reopen(self) -> None:
        """Removes the marks of a complete run, `_SUCCESS` first, because nobody reads a manifest without it."""
        self.store.delete(SUCCESS)
        self.store.delete(MANIFEST)

    def _manifest(self) -> bytes | None:
        """The manifest of a complete run; None if `_SUCCESS` does not hold its hash."""
        success = self.read_or_none(SUCCESS)
        if success is None:
            return None
        with contextlib.suppress(ValueError):
            mark = json.loads(success)
            expected = mark.get("manifest") if isinstance(mark, dict) else None
            data = self.read_or_none(MANIFEST) if expected else None
            if data is not None and hashlib.sha256(data).hexdigest() == expected:
                return data
        return None

    # ---- failures ----

    def record_failure(self, shard: int, failure: Mapping[str, Any]) -> None:
        """Records why the last attempt at a shard failed."""
        self.store.put(f"failures/{shard:06d}.json", json.dumps(failure, indent=1).encode() + b"\n")

    def clear_failure(self, shard: int) -> None:
        """Forgets a failure once the shard succeeded."""
        self.store.delete(f"failures/{shard:06d}.json")

    def failures(self) -> dict[int, dict[str, Any]]:
        """Shard -> why its last attempt failed."""
        names = self.store.list("failures")
        with ThreadPoolExecutor(_READERS) as pool:
            found = zip(names, pool.map(self.read_or_none, names), strict=True)
            return {int(Path(name).stem): json.loads(data) for name, data in found if data is not None}


def _decoded(data: bytes) -> list[Commit] | None:
    try:
        return list(manifest.decode(data))
    except DamagedRecordError:
        return None
