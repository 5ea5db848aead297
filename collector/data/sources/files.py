"""Opens files, local or behind a URL, and detects whether one has changed.

A local file is a path, everything else a URL. s3://, gs://, az:// and abfs:// go through obstore, so
that no cloud's own SDK is needed, all others (https://, hf://, memory:// …) through fsspec. Files
are opened for reading only and read by range, never downloaded whole.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import BinaryIO

_OBSTORE_PROTOCOLS = ("s3", "s3a", "gs", "gcs", "az", "azure", "abfs", "abfss", "adl")
_ETAGS = ("e_tag", "ETag", "etag", "blob_id")
_EDGE = 1 << 20


def is_url(location: str) -> bool:
    """Whether a location is not a local path."""
    return "://" in location


def absolute(location: str) -> str:
    """Returns a location that denotes the same file in every working directory."""
    location = location.removeprefix("file://")
    return location if is_url(location) else os.path.normpath(Path(location).expanduser().absolute())


@functools.cache
def _register(protocol: str) -> None:
    import obstore.fsspec

    obstore.fsspec.register(protocol)


def filesystem_of(location: str) -> tuple[Any, str]:
    """Returns the fsspec file system of a location, and the path in it."""
    import fsspec

    protocol = location.partition("://")[0]
    if protocol in _OBSTORE_PROTOCOLS:
        _register(protocol)
    return fsspec.core.url_to_fs(location)


def open_file(location: str, *, scattered: bool = False) -> BinaryIO:
    """Opens a file for reading by range.

    Args:
        location: absolute path or URL.
        scattered: whether reads are random access, so that reading ahead would be wasted.
    """
    if not is_url(location):
        try:
            return Path(location).open("rb")
        except PermissionError as error:
            raise ValueError(f"{location} cannot be read: {error.strerror}") from error
    filesystem, path = filesystem_of(location)
    return filesystem.open(path, "rb", **({"cache_type": "none"} if scattered else {}))


def fingerprint(location: str) -> str:
    """Returns a string that changes with a file's content: the store's own tag, else size and a hash of both ends.

    Raises:
        ValueError: a server does not report the file's length, so the file cannot be read by range.
    """
    if is_url(location):
        filesystem, path = filesystem_of(location)
        info = filesystem.info(path)
        if info.get("size") is None:
            raise ValueError(f"{location}: the server cannot be read from the middle of a file; download it first")
        if tag := next((info[key] for key in _ETAGS if info.get(key)), None):
            return f"etag:{tag}"
    with open_file(location) as file:
        size = file.seek(0, os.SEEK_END)
        digest = hashlib.sha256()
        for start in (0, max(0, size - _EDGE)):
            file.seek(start)
            digest.update(file.read(_EDGE))
    return f"size:{size}-sha256:{digest.hexdigest()}"
