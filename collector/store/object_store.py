"""The store that is a prefix of an object store: s3://, gs:// or az://, through obstore.

Guarantees: a file appears by one upload, whole, or not at all; `put_new` is a conditional PUT. Passing failures are
retried. A refusal raises a `StoreError` of one line with the URL and the remedy. Credentials come from the
environment's usual chains alone.

A multipart upload that fails is aborted. If its process dies, the uploaded parts stay, invisible, until a lifecycle
rule of the bucket removes them.
"""

from __future__ import annotations

import contextlib
import uuid
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collector.store.local_store import Entry, StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from obstore.store import RetryConfig

_RETRIES: RetryConfig = {
    "max_retries": 8,
    "retry_timeout": timedelta(minutes=3),
    "backoff": {"init_backoff": timedelta(milliseconds=200), "max_backoff": timedelta(seconds=20), "base": 2},
}
"""Of each request: server errors, throttling, lost connections and timeouts; for about a minute in all."""
_CREDENTIALS = (
    "credentials come from the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
    "GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_KEY) or from the machine's role"
)
_REMEDIES = (
    ("NoSuchBucket", "the bucket does not exist: create it, or correct the name"),
    ("builder error", "the endpoint is plain http: set AWS_ALLOW_HTTP=true if it is meant, or give an https:// one"),
    ("InvalidAccessKeyId", f"the access key is unknown: {_CREDENTIALS}"),
    ("SignatureDoesNotMatch", f"the secret key is not the access key's: {_CREDENTIALS}"),
    ("169.254.169.254", f"no credentials were found: {_CREDENTIALS}"),
    ("metadata.google.internal", f"no credentials were found: {_CREDENTIALS}"),
    ("Unable to recognise URL", "take a local path, s3://BUCKET/PATH, gs://BUCKET/PATH or az://CONTAINER/PATH"),
    ("403 Forbidden", "access is denied: the credentials must allow to list, read, write and delete below this URL"),
    ("401 Unauthorized", f"the store does not know these credentials: {_CREDENTIALS}"),
)


class ObjectStore:
    """A prefix of an object store with conditional PUTs, or any other store of obstore."""

    def __init__(self, root: str, store: Any = None) -> None:
        import obstore.store

        self.root = root.rstrip("/")
        with self._told(""):
            self.store = obstore.store.from_url(self.root, retry_config=_RETRIES) if store is None else store

    @contextlib.contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """Turns obstore's errors into FileNotFoundError, or into one line for the user."""
        import obstore

        try:
            yield
        except (obstore.exceptions.BaseError, FileNotFoundError) as error:
            missing = isinstance(error, (FileNotFoundError, obstore.exceptions.NotFoundError))
            if missing and "NoSuchBucket" not in str(error):
                raise FileNotFoundError(f"{self.location(name)}: there is no such file") from error
            raise StoreError(f"{self.location(name)}: {_remedy(error)}") from error

    def put_new(self, name: str, data: bytes) -> bool:
        """See `Store.put_new`: a conditional PUT."""
        import obstore

        with self._told(name):
            try:
                obstore.put(self.store, name, data, mode="create")
            except (FileExistsError, obstore.exceptions.AlreadyExistsError):
                return False
        return True

    def put(self, name: str, data: bytes) -> None:
        """See `Store.put`."""
        import obstore

        with self._told(name):
            obstore.put(self.store, name, data)

    def publish(self, scratch: Path, name: str) -> None:
        """See `Store.publish`: one upload, multipart if the file is large; then the scratch file is removed."""
        import obstore

        with self._told(name):
            obstore.put(self.store, name, scratch)
        scratch.unlink()

    def read(self, name: str) -> bytes:
        """See `Store.read`."""
        import obstore

        with self._told(name):
            return bytes(obstore.get(self.store, name).bytes())

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes from `start` to before `end` of each range, fetched at once; FileNotFoundError if there is none."""
        import obstore

        with self._told(name):
            starts, ends = [start for start, _ in ranges], [end for _, end in ranges]
            return [bytes(part) for part in obstore.get_ranges(self.store, name, starts=starts, ends=ends)]

    def local_copy(self, name: str, folder: Path) -> Path:
        """See `Store.local_copy`: a download in pieces."""
        import obstore

        copy = folder / f"{uuid.uuid4().hex}-{Path(name).name}"
        with self._told(name):
            stream = obstore.get(self.store, name).stream()
            with copy.open("xb") as file:
                for piece in stream:
                    file.write(piece)
        return copy

    def list(self, prefix: str) -> list[str]:
        """See `Store.list`."""
        return [entry.name for entry in self.entries(prefix)]

    def entries(self, prefix: str) -> Sequence[Entry]:
        """See `Store.entries`."""
        import obstore

        with self._told(prefix):
            objects = obstore.list_with_delimiter(self.store, prefix)["objects"]
        return [
            Entry(name=each["path"], size=each["size"], modified=each["last_modified"].timestamp())
            for each in sorted(objects, key=lambda each: each["path"])
        ]

    def litter(self) -> Sequence[Entry]:
        """See `Store.litter`: always empty, because only the bucket's lifecycle rules see interrupted uploads."""
        return []

    def delete(self, name: str) -> None:
        """See `Store.delete`."""
        import obstore

        with contextlib.suppress(FileNotFoundError), self._told(name):
            obstore.delete(self.store, name)

    def location(self, name: str) -> str:
        """See `Store.location`."""
        return f"{self.root}/{name}"

    def scratch_parent(self) -> Path | None:
        """See `Store.scratch_parent`."""
        return None


def _remedy(error: Exception) -> str:
    """What went wrong and what to do about it, in one line."""
    text = str(error)
    said = text.splitlines()[0][:300] if text else type(error).__name__
    known = next((remedy for sign, remedy in _REMEDIES if sign in text), None)
    return f"{known} ({said})" if known else f"the store does not answer as it should, retries included: {said}"
