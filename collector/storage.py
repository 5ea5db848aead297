"""The run directory: where parts are published and shards committed, exactly once.

    RUN/plan.parquet                            the frozen shards; its metadata holds config and hash
    RUN/run.json                                model, routers, versions
    RUN/vocab.parquet                           token ids as readable text
    RUN/data/<shard>-<attempt>.<table>.parquet  parts, each attempt under a name of its own
    RUN/commits/<shard>.json                    what makes an attempt's parts count
    RUN/failures/<shard>.json                   why a shard's last attempt failed
    RUN/views.sql, RUN/_SUCCESS                 when every shard is committed

Guarantees: a name appears only whole and durable (written beside, fsynced, linked or renamed; on
an object store one upload). `put_new` lets exactly one of any number of writers win. Readers open
the files that commit records name, so a part without a record does not exist. Nothing here deletes
what another attempt wrote.

Local paths and object stores (s3:// gs:// az://, through obstore) behave alike. What is in the
files is the business of `records` and of the callers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PLAN, RUN, VOCAB, VIEWS, SUCCESS = "plan.parquet", "run.json", "vocab.parquet", "views.sql", "_SUCCESS"
TABLES = ("routing", "tokens", "documents")


class Store(Protocol):
    """The few operations that a run needs of a file system."""

    def put_new(self, name: str, data: bytes) -> bool:
        """Creates `name` with `data`, whole; False if it exists already."""

    def put(self, name: str, data: bytes) -> None:
        """Creates or replaces `name`, whole."""

    def publish(self, scratch: Path, name: str) -> None:
        """Moves a finished scratch file to `name`."""

    def read(self, name: str) -> bytes:
        """The content of `name`; FileNotFoundError if there is none."""

    def list(self, prefix: str) -> list[str]:
        """Sorted names directly below the folder `prefix`."""

    def delete(self, name: str) -> None:
        """Removes `name` if it is there."""

    def location(self, name: str) -> str:
        """Path or URL under which other programs read `name`."""

    def scratch_parent(self) -> Path | None:
        """Folder for scratch files (None: the system's)."""


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class LocalStore:
    """A folder of a local or shared POSIX file system with hard links."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def _write_beside(self, path: Path, data: bytes) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
        with beside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return beside

    def put_new(self, name: str, data: bytes) -> bool:
        """See `Store.put_new`: a hard link succeeds for one writer only."""
        path = self.root / name
        beside = self._write_beside(path, data)
        try:
            os.link(beside, path)
        except FileExistsError:
            return False
        finally:
            beside.unlink()
        _fsync(path.parent)
        return True

    def put(self, name: str, data: bytes) -> None:
        """See `Store.put`."""
        path = self.root / name
        self._write_beside(path, data).replace(path)
        _fsync(path.parent)

    def publish(self, scratch: Path, name: str) -> None:
        """See `Store.publish`: fsync, rename, fsync of the folder."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _fsync(scratch)
        scratch.rename(path)
        _fsync(path.parent)

    def read(self, name: str) -> bytes:
        """See `Store.read`."""
        return (self.root / name).read_bytes()

    def list(self, prefix: str) -> list[str]:
        """See `Store.list`."""
        folder = self.root / prefix
        if not folder.is_dir():
            return []
        return sorted(f"{prefix}/{entry.name}" for entry in folder.iterdir() if not entry.name.startswith("."))

    def delete(self, name: str) -> None:
        """See `Store.delete`."""
        (self.root / name).unlink(missing_ok=True)

    def location(self, name: str) -> str:
        """See `Store.location`."""
        return str(self.root / name)

    def scratch_parent(self) -> Path | None:
        """A hidden folder of the run, so that publishing is a rename."""
        folder = self.root / ".scratch"
        folder.mkdir(parents=True, exist_ok=True)
        return folder


class ObjectStore:
    """A prefix of an object store with conditional puts, or any other store of obstore."""

    def __init__(self, root: str, store: Any = None) -> None:
        import obstore.store

        self.root = root.rstrip("/")
        self.store = obstore.store.from_url(self.root) if store is None else store

    def put_new(self, name: str, data: bytes) -> bool:
        """See `Store.put_new`: a PUT on condition that nothing is there."""
        import obstore

        try:
            obstore.put(self.store, name, data, mode="create")
        except (FileExistsError, obstore.exceptions.AlreadyExistsError):
            return False
        return True

    def put(self, name: str, data: bytes) -> None:
        """See `Store.put`."""
        import obstore

        obstore.put(self.store, name, data)

    def publish(self, scratch: Path, name: str) -> None:
        """See `Store.publish`: one upload, then the scratch file goes."""
        import obstore

        obstore.put(self.store, name, scratch)
        scratch.unlink()

    def read(self, name: str) -> bytes:
        """See `Store.read`."""
        import obstore

        return bytes(obstore.get(self.store, name).bytes())

    def list(self, prefix: str) -> list[str]:
        """See `Store.list`."""
        import obstore

        return sorted(item["path"] for item in obstore.list_with_delimiter(self.store, prefix)["objects"])

    def delete(self, name: str) -> None:
        """See `Store.delete`."""
        import obstore

        try:
            obstore.delete(self.store, name)
        except FileNotFoundError:
            return

    def location(self, name: str) -> str:
        """See `Store.location`."""
        return f"{self.root}/{name}"

    def scratch_parent(self) -> Path | None:
        """See `Store.scratch_parent`."""
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One published file."""

    path: str
    """Relative to the run directory."""
    rows: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skipped:
    """Rows of one shard that became no document, for one reason."""

    count: int
    examples: tuple[str, ...]
    """Where the first few of them are, without their text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Commit:
    """A shard's commit record: the attempt whose parts count, and what they hold."""

    shard: int
    attempt: str
    plan_hash: str
    files: Mapping[str, Part]
    """Table name -> part."""
    documents: int
    tokens: int
    """Tokens that went through the model, those of the encoder and of the decoder together."""
    rows: int
    """Rows of the routing table: per recorded router the tokens of its stack."""
    characters: int
    truncated: int
    """Documents cut at the maximum length, text or target."""
    skipped: Mapping[str, Skipped]
    """Reason -> rows that became no document."""
    batches: int
    padded_tokens: int
    """Tokens that went through the model, padding included."""
    halved: int = 0
    """Batches that did not fit into memory and were halved."""
    seconds: Mapping[str, float]
    """Stage -> wall time."""
    node: str

    def to_json(self) -> bytes:
        """The record as it is stored."""
        return json.dumps(dataclasses.asdict(self), indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> Commit:
        """Reads what `to_json` wrote."""
        fields = json.loads(data)
        fields["files"] = {table: Part(**part) for table, part in fields["files"].items()}
        fields["skipped"] = {
            reason: Skipped(count=s["count"], examples=tuple(s["examples"])) for reason, s in fields["skipped"].items()
        }
        return cls(**fields)


def _commit_name(shard: int) -> str:
    return f"commits/{shard:06d}.json"


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class RunDirectory:
    """A run on a store: plan, commits, failures and the files beside them."""

    def __init__(self, root: str | os.PathLike[str], store: Store | None = None) -> None:
        self.root = os.fspath(root)
        local = "://" not in self.root
        if local:
            self.root = str(Path(self.root).absolute())  # workers have another current folder
        self.store: Store = store or (LocalStore(Path(self.root)) if local else ObjectStore(self.root))

    def scratch(self) -> tempfile.TemporaryDirectory[str]:
        """A folder for files being written; it goes with its context."""
        return tempfile.TemporaryDirectory(
            prefix="attempt-", dir=self.store.scratch_parent(), ignore_cleanup_errors=True
        )

    def read_or_none(self, name: str) -> bytes | None:
        """The content of a file, or None where there is none."""
        try:
            return self.store.read(name)
        except FileNotFoundError:
            return None

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the run; FileNotFoundError if there is none."""
        return json.loads(self.store.read(name))

    def publish_part(self, scratch: Path, shard: int, attempt: str, table: str, rows: int) -> Part:
        """Publishes a finished file under the attempt's own name."""
        name = f"data/{shard:06d}-{attempt}.{table}.parquet"
        part = Part(path=name, rows=rows, bytes=scratch.stat().st_size, sha256=sha256_of(scratch))
        self.store.publish(scratch, name)
        return part

    def commit(self, record: Commit) -> Commit:
        """Makes an attempt's parts count, unless another attempt was first.

        Returns:
            The record that counts. If it is another attempt's, this attempt's parts are deleted.
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
        winner = Commit.from_json(self.store.read(name))
        if winner.attempt != record.attempt:
            for part in record.files.values():
                self.store.delete(part.path)
        return winner

    def committed_shards(self) -> set[int]:
        """Numbers of the shards that have a commit record; reads no record."""
        return {int(Path(name).stem) for name in self.store.list("commits")}

    def commits(self) -> Iterator[Commit]:
        """All commit records, by shard."""
        for name in self.store.list("commits"):
            yield Commit.from_json(self.store.read(name))

    def read_commit(self, shard: int) -> Commit | None:
        """A shard's commit record, or None."""
        data = self.read_or_none(_commit_name(shard))
        return None if data is None else Commit.from_json(data)

    def record_failure(self, shard: int, failure: Mapping[str, Any]) -> None:
        """Notes why the last attempt at a shard failed."""
        self.store.put(f"failures/{shard:06d}.json", json.dumps(failure, indent=1).encode() + b"\n")

    def clear_failure(self, shard: int) -> None:
        """Forgets a failure once the shard succeeded."""
        self.store.delete(f"failures/{shard:06d}.json")

    def failures(self) -> dict[int, dict[str, Any]]:
        """Shard -> why its last attempt failed."""
        return {int(Path(name).stem): self.read_json(name) for name in self.store.list("failures")}
