"""Lists and opens files, local or behind a URL, and detects whether one has changed.

A local file is a path, everything else a URL. s3://, gs://, az:// and abfs:// go through obstore, so
that no cloud's own SDK is needed, all others (https://, hf://, memory:// …) through fsspec. Files
are opened for reading only and read by range, never downloaded whole.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from collector.data.sources.kinds import COMPRESSIONS, KINDS

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


def _filesystem(location: str) -> tuple[Any, str]:
    """Returns the fsspec file system of a location, and the path in it."""
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


_MAGIC = "*?["
_NO_DATA = re.compile(
    r"(?i)readme.*|licen[cs]e.*|notice.*|changelog.*|.*\.(md|ya?ml|py|sh|lock|crc|sha256|md5|log)|dataset_infos?\.json|state\.json"
)
"""Names of files that lie beside data and are none."""


def list_files(spec: str) -> list[str]:
    """Returns the files that a path, URL or glob denotes, of a folder all data files in it: absolute, sorted.

    What exists by a name with `*`, `?` or `[` in it is taken by that name.

    Raises:
        ValueError: there are none, or something that is no file.
    """
    if "::" in spec:
        raise ValueError(f"--data {spec}: files inside other files are not supported; extract them first")
    filesystem, path = _filesystem(absolute(spec))
    found = _type(filesystem, path)
    if found == "directory":
        return _in_folder(spec, filesystem, path)
    if found is None:
        matches = filesystem.glob(_literal(path, spec), detail=True).items()
        paths = [name for name, info in matches if info["type"] == "file" or _is_link_to_file(name, info)]
        if not paths:
            raise ValueError(f"--data {spec}: no file matches {absolute(spec)}")
        return sorted(absolute(filesystem.unstrip_protocol(name)) for name in paths)
    if found != "file":
        raise ValueError(
            f"--data {spec} is neither a file nor a folder: a pipe or device cannot be read twice; save it first"
        )
    return [absolute(spec)]


def _is_link_to_file(name: str, info: dict[str, Any]) -> bool:
    """Whether a match is a symbolic link to a file, such as the hub's cache is made of; fsspec calls it `other`."""
    return bool(info.get("islink")) and Path(name).is_file()


def _literal(path: str, spec: str) -> str:
    """Escapes those parts of a local glob that exist as they are written."""
    if is_url(spec):
        return path
    done = Path("/")
    parts = []
    for part in Path(path).parts[1:]:
        exists = done is not None and any(character in part for character in _MAGIC) and (done / part).exists()
        parts.append("".join(f"[{c}]" if exists and c in _MAGIC else c for c in part))
        done = done / part
    return "/" + "/".join(parts)


def _in_folder(spec: str, filesystem: Any, path: str) -> list[str]:
    """Returns the data files of a folder and those below it, if they are of one kind.

    Raises:
        ValueError: they are of several kinds, or there are none.
    """
    inside = [name[len(path) :].lstrip("/") for name in filesystem.find(path)]
    data = [name for name in inside if not _is_beside_data(name)]
    endings: dict[str, list[str]] = {}
    for name in data:
        kind, example = _ending(name)
        endings.setdefault(kind, []).append(example)
    if not data:
        raise ValueError(f"--data {spec}: the folder holds no data file")
    if len(endings) > 1:
        counts = ", ".join(f"{len(names)} of {kind}" for kind, names in sorted(endings.items()))
        globs = " or ".join(f"'{spec.rstrip('/')}/**/*{names[0]}'" for _, names in sorted(endings.items()))
        raise ValueError(f"--data {spec} holds files of several kinds, {counts}: give one of them, {globs}")
    return sorted(f"{absolute(spec).rstrip('/')}/{name}" for name in data)


def _is_beside_data(name: str) -> bool:
    parts = name.split("/")
    return any(part.startswith((".", "_")) for part in parts) or bool(_NO_DATA.fullmatch(parts[-1]))


def _ending(name: str) -> tuple[str, str]:
    """Returns what kind of data a name promises, and its ending."""
    path = PurePosixPath(name.lower())
    packed = path.suffix if path.suffix in COMPRESSIONS else ""
    inner = (path.with_suffix("") if packed else path).suffix
    return KINDS.get(inner, inner or "no ending"), PurePosixPath(name).suffix if not packed else f"{inner}{packed}"


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
    filesystem, path = _filesystem(location)
    return filesystem.open(path, "rb", **({"cache_type": "none"} if scattered else {}))


def fingerprint(location: str) -> str:
    """Returns a string that changes with a file's content: the store's own tag, else size and a hash of both ends.

    Raises:
        ValueError: a server does not report the file's length, so the file cannot be read by range.
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
