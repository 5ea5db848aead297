"""The interface of a store, and the store that is a local or shared folder.

Guarantees, which `object_store` gives as well:

- A file appears under its name whole and durable (written beside, fsynced, then linked or renamed), or not at all. A
  write that fails, for lack of space for example, leaves nothing under the name and nothing half-written beside it.
- Of any number of writers that call `put_new` with one name, exactly one wins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import shutil
import stat
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SCRATCH = ".scratch"
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
_FULL = (
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    "nothing of it was kept; free some space, and the same command resumes the run",
)
_LINKLESS = (
    (errno.EPERM, errno.ENOTSUP, errno.ENOSYS),
    "a commit needs hard links; put the run on a file system that has them, or on an object store",
)


class StoreError(RuntimeError):
    """An object store refused, or did not answer after all retries. The message names the URL and the remedy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One file, or a folder of scratch files, as a listing shows it."""

    name: str
    """Relative to the run directory."""
    size: int
    """Bytes."""
    modified: float
    """When it was last written, in seconds since 1970 by the clock of the store."""


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

    def local_copy(self, name: str, folder: Path) -> Path:
        """A local file with the content of `name`: itself or a copy in `folder`; FileNotFoundError if there is none."""

    def list(self, prefix: str) -> list[str]:
        """Sorted names directly below the folder `prefix`."""

    def entries(self, prefix: str) -> Sequence[Entry]:
        """The same files as `list`, with sizes and times."""

    def litter(self) -> Sequence[Entry]:
        """Files that interrupted writes left behind; `list` does not show their names."""

    def delete(self, name: str) -> None:
        """Removes `name` if it is there: a file, or an entry of `litter`."""

    def location(self, name: str) -> str:
        """Path or URL under which other programs read `name`."""

    def scratch_parent(self) -> Path | None:
        """Folder for scratch files (None: the system's)."""


# ---- folders ----


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _explained(path: Path, numbers: tuple[int, ...], remedy: str) -> Iterator[None]:
    """Adds the remedy to operating-system errors with these numbers."""
    try:
        yield
    except OSError as error:
        if error.errno not in numbers:
            raise
        raise OSError(error.errno, f"{error.strerror}: {remedy}", str(path)) from error


class LocalStore:
    """A folder of a local or shared POSIX file system with hard links."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    @contextlib.contextmanager
    def _written_beside(self, path: Path, data: bytes) -> Iterator[Path]:
        """Writes a durable temporary file next to `path`. It is gone when the context ends, whatever happens in it."""
        beside = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
        with _explained(path, *_FULL):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with beside.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                yield beside
            finally:
                beside.unlink(missing_ok=True)

    def put_new(self, name: str, data: bytes) -> bool:
        """See `Store.put_new`: a hard link succeeds for one writer only."""
        path = self.root / name
        with self._written_beside(path, data) as beside, _explained(path, *_LINKLESS):
            try:
                os.link(beside, path)
            except FileExistsError:
                return False
        _fsync(path.parent)
        return True

    def put(self, name: str, data: bytes) -> None:
        """See `Store.put`."""
        path = self.root / name
        with self._written_beside(path, data) as beside:
            beside.replace(path)
        _fsync(path.parent)

    def publish(self, scratch: Path, name: str) -> None:
        """See `Store.publish`: fsync, rename, fsync of the folder."""
        path = self.root / name
        with _explained(path, *_FULL):
            path.parent.mkdir(parents=True, exist_ok=True)
            _fsync(scratch)
            scratch.rename(path)
            _fsync(path.parent)

    def read(self, name: str) -> bytes:
        """See `Store.read`."""
        return (self.root / name).read_bytes()

    def local_copy(self, name: str, folder: Path) -> Path:  # noqa: ARG002  # no copy is needed
        """See `Store.local_copy`: the file itself."""
        path = self.root / name
        if not path.is_file():
            raise FileNotFoundError(path)
        return path

    def list(self, prefix: str) -> list[str]:
        """See `Store.list`."""
        folder = self.root / prefix
        if not folder.is_dir():
            return []
        return sorted(f"{prefix}/{entry.name}" for entry in folder.iterdir() if not entry.name.startswith("."))

    def entries(self, prefix: str) -> Sequence[Entry]:
        """See `Store.entries`."""
        return [entry for name in self.list(prefix) if (entry := self._entry(self.root / name)) is not None]

    def litter(self) -> Sequence[Entry]:
        """See `Store.litter`: temporary files beside names, and the scratch folders of attempts."""
        folders = [self.root, *(path for path in self.root.iterdir() if path.is_dir() and path.name != SCRATCH)]
        beside = [path for folder in folders for path in folder.iterdir() if _TEMPORARY.fullmatch(path.name)]
        scratch = [path for path in (self.root / SCRATCH).glob("attempt-*") if path.is_dir()]
        return [entry for path in sorted(beside + scratch) if (entry := self._entry(path)) is not None]

    def _entry(self, path: Path) -> Entry | None:
        """A file, or a folder with everything in it; None if it was removed meanwhile."""
        try:
            inside = [each.stat() for each in ([path, *path.rglob("*")] if path.is_dir() else [path])]
        except FileNotFoundError:
            return None
        return Entry(
            name=str(path.relative_to(self.root)),
            size=sum(each.st_size for each in inside if stat.S_ISREG(each.st_mode)),
            modified=max(each.st_mtime for each in inside),
        )

    def delete(self, name: str) -> None:
        """See `Store.delete`."""
        path = self.root / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def location(self, name: str) -> str:
        """See `Store.location`."""
        return str(self.root / name)

    def scratch_parent(self) -> Path | None:
        """A hidden folder of the run, so that publishing is a rename."""
        folder = self.root / SCRATCH
        folder.mkdir(parents=True, exist_ok=True)
        return folder
