"""Files, local or behind a URL: listing, opening, and telling whether one has changed.

A local file is a path, everything else a URL. s3://, gs://, az:// and abfs:// go through obstore, so
that no cloud's own SDK is needed, all others (https://, hf://, memory:// …) through fsspec. Files
are opened for reading only, and read by range: nothing is ever downloaded whole.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import BinaryIO

_OBSTORE_PROTOCOLS = ("s3", "s3a", "gs", "gcs", "az", "azure", "abfs", "abfss", "adl")
_ETAGS = ("e_tag", "ETag", "etag", "blob_id")
_EDGE = 1 << 20

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "txt",
}
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip", ".lz4", ".7z")


def is_url(location: str) -> bool:
    """Whether a location is not a local path."""
    return "://" in location


def absolute(location: str) -> str:
    """A location that means the same file in every working directory."""
    location = location.removeprefix("file://")
    return location if is_url(location) else os.path.normpath(Path(location).expanduser().absolute())


def file_name(location: str) -> PurePosixPath:
    """The last part of a path or URL."""
    path = location.partition("?")[0] if location.startswith("http") else location
    return PurePosixPath(PurePosixPath(path).name)


def kind_of(location: str) -> str:
    """How a file is read, by the ending of its name; plain text if that says nothing.

    Raises:
        ValueError: the file is compressed.
    """
    suffix = file_name(location).suffix.lower()
    if suffix in _COMPRESSED:
        raise ValueError(
            f"{location}: {suffix} files are not supported, since a shard cannot be read from their middle; "
            f"decompress it, or convert it to Parquet"
        )
    return KINDS.get(suffix, "txt")


@functools.cache
def _register(protocol: str) -> None:
    import obstore.fsspec

    obstore.fsspec.register(protocol)


def _filesystem(location: str) -> tuple[Any, str]:
    """The fsspec file system of a location, and what it calls it."""
    import fsspec

    protocol = location.partition("://")[0]
    if protocol in _OBSTORE_PROTOCOLS:
        _register(protocol)
    return fsspec.core.url_to_fs(location)


def _type(filesystem: Any, path: str) -> str | None:
    try:
        return filesystem.info(path)["type"]
    except FileNotFoundError:
        return None


def list_files(spec: str) -> list[str]:
    """The files that a path, URL or glob stands for: absolute, sorted.

    Raises:
        ValueError: there are none, or it is a folder.
    """
    if "::" in spec:
        raise ValueError(f"--data {spec}: files inside other files are not supported; extract them first")
    filesystem, path = _filesystem(absolute(spec))
    found = _type(filesystem, path)
    if found == "directory":
        or_hf = "" if is_url(spec) else f", or hf:{spec}"
        raise ValueError(f"--data {spec} is a folder: give a glob such as {spec.rstrip('/')}/*.jsonl{or_hf}")
    if found is None:
        paths = [name for name, info in filesystem.glob(path, detail=True).items() if info["type"] == "file"]
        if not paths:
            raise ValueError(f"--data {spec}: no file matches {absolute(spec)}")
        return sorted(absolute(filesystem.unstrip_protocol(name)) for name in paths)
    return [absolute(spec)]


def open_file(location: str, *, scattered: bool = False) -> BinaryIO:
    """Opens a file for reading by range.

    Args:
        location: absolute path or URL.
        scattered: whether reads jump about, so that reading ahead would be in vain.
    """
    if not is_url(location):
        return Path(location).open("rb")
    filesystem, path = _filesystem(location)
    return filesystem.open(path, "rb", **({"cache_type": "none"} if scattered else {}))


def fingerprint(location: str) -> str:
    """What changes when a file's content does: the store's own tag, else size and both ends.

    Raises:
        ValueError: a server does not say how long the file is, and so cannot be read by range.
    """
    if is_url(location):
        filesystem, path = _filesystem(location)
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
