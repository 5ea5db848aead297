"""Lists the files that a path, URL, glob or folder denotes.

A name that exists is taken literally, whatever characters it has; only then are `*`, `?` and `[…]`
wildcards. This holds for each part of a path, from the left up to the first wildcard. Hidden files
match no wildcard, as in a shell.
"""

from __future__ import annotations

import collections
import glob
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from collector.data.sources.files import absolute, filesystem_of, is_url
from collector.data.sources.kinds import COMPRESSIONS, KINDS, endings

_MAGIC = re.compile(r"[*?[]")
# Such names belong to processes that are not open to others, and may be pipes.
_OF_PROCESS = re.compile(r"/dev/(stdin|fd/.*)|/proc/.*")
# Files beside the data that hold no documents: hidden ones, notes, licenses, cards and checksums.
_BESIDE = re.compile(
    r"[._].*|(readme|license|licence|copying|notice|citation|changelog|authors)(\.\w+)?|dataset_(infos?|dict|card)\.\w+"
    r"|(md5|sha\d+|check)sums?(\.\w+)?|.*\.(md5|sha1|sha256|sha512|crc)",
    re.IGNORECASE,
)


def list_files(spec: str) -> list[str]:
    """Returns the files that a path, URL, glob or folder denotes: absolute, sorted.

    Raises:
        ValueError: there are none, they are of several kinds, or one of them cannot be read by range.
    """
    if "::" in spec and not os.path.lexists(absolute(spec)):
        raise ValueError(f"--data {spec}: files inside other files are not supported; extract them first")
    return _list_remote(spec) if is_url(absolute(spec)) else _list_local(spec)


# -- local files -------------------------------------------------------------------------------------


def _list_local(spec: str) -> list[str]:
    path = absolute(spec)
    if os.path.lexists(path):
        if Path(path).is_dir():
            return _of_one_kind(spec, path, _walk(path))
        _require_regular(spec, path)
        return [path]
    found = sorted(glob.glob(_escaped(path, os.path.lexists), recursive=True))  # noqa: PTH207 (Path.glob finds hidden files)
    paths = [each for each in found if not Path(each).is_dir()]
    if not paths:
        raise _nothing(spec, bool(found))
    for each in paths:
        _require_regular(spec, each)
    return paths


def _require_regular(spec: str, path: str) -> None:
    """Raises if a path is no regular file, which alone can be read from any place and more than once."""
    if not Path(path).exists():
        raise ValueError(f"--data {spec}: {path} is a link to a file that does not exist")
    if not Path(path).is_file() or _OF_PROCESS.fullmatch(path):
        raise ValueError(f"--data {spec} is a pipe or device, which can be read only once: write its content to a file")


def _walk(folder: str) -> list[str]:
    """Returns the files below a folder; links to folders are followed, each folder once."""

    def stop(error: OSError) -> None:
        raise error

    found: list[str] = []
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=stop):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        found += [f"{parent.rstrip('/')}/{name}" for name in names]
    return found


# -- files behind a URL ------------------------------------------------------------------------------


def _list_remote(spec: str) -> list[str]:
    filesystem, path = filesystem_of(absolute(spec))
    found = _type(filesystem, path)
    if found == "directory":
        infos = filesystem.find(path, detail=True)
        # Consoles mark a folder by an empty object of its name.
        folders = {str(parent) for name in infos for parent in PurePosixPath(name).parents}
        names = [name for name, info in infos.items() if info.get("size") or name.rstrip("/") not in folders]
        return _of_one_kind(spec, path, names, filesystem)
    if found is not None:
        return [absolute(spec)]
    # In an http URL, a question mark is no wildcard and asking whether a part exists tells nothing.
    pattern = path if absolute(spec).startswith("http") else _escaped(path, filesystem.exists)
    matches = filesystem.glob(pattern, detail=True)
    paths = [name for name, info in matches.items() if info["type"] == "file" and not _is_hidden(name, path)]
    if not paths:
        raise _nothing(spec, bool(matches))
    return sorted(absolute(filesystem.unstrip_protocol(name)) for name in paths)


def _type(filesystem: Any, path: str) -> str | None:
    try:
        info = filesystem.info(path)
    except FileNotFoundError:
        return None
    # A bucket as a whole has no name, and obstore takes it for a file.
    return info["type"] if info["name"] else "directory"


def _is_hidden(name: str, pattern: str) -> bool:
    return "/." in name and "/." not in pattern


# -- both --------------------------------------------------------------------------------------------


def _escaped(path: str, exists: Any) -> str:
    """Returns a glob in which those first parts of a path that exist are literal."""
    parts = path.split("/")
    literal = 0
    for count in range(1, len(parts)):
        if _MAGIC.search(parts[count - 1]) and not exists("/".join(parts[:count])):
            break
        literal = count
    return "/".join([*map(glob.escape, parts[:literal]), *parts[literal:]])


def _nothing(spec: str, are_folders: bool) -> ValueError:
    if are_folders:
        return ValueError(f"--data {spec} matches folders alone: give one folder, or a glob of files such as {spec}/*")
    return ValueError(f"--data {spec}: no file matches {absolute(spec)}")


def _of_one_kind(spec: str, folder: str, paths: list[str], filesystem: Any = None) -> list[str]:
    """Returns the data files of a folder, sorted; what is hidden or only beside the data is left out.

    Raises:
        ValueError: there are none, or their names have different endings.
    """
    inside = {path: path.removeprefix(folder.rstrip("/")).strip("/").split("/") for path in paths}
    if any(parts[0] == "_delta_log" for parts in inside.values()):
        raise ValueError(f"--data {spec} is a Delta table, whose files keep deleted rows: export it to Parquet first")
    data = sorted(path for path, parts in inside.items() if not _is_beside(parts))
    if not data:
        raise ValueError(f"--data {spec} is a folder without data files")
    kinds = collections.Counter("".join(endings(path)) for path in data)
    if len({KINDS.get(endings(path)[0], endings(path)[0]) for path in data}) > 1:
        shown = ", ".join(f"{count} {ending or 'without an ending'}" for ending, count in kinds.most_common(5))
        globs = [f"'{spec.rstrip('/')}/**/*{ending}'" for ending, _ in kinds.most_common() if ending in _readable()]
        choice = f"choose one with a glob, such as {' or '.join(globs[:2] or [spec + '/*'])}"
        raise ValueError(f"--data {spec} is a folder of several kinds of files ({shown}): {choice}")
    if filesystem is not None:
        return [absolute(filesystem.unstrip_protocol(path)) for path in data]
    for path in data:
        _require_regular(spec, path)
    return data


def _readable() -> set[str]:
    """Returns all endings of files that can be read."""
    return {kind + packing for kind in KINDS for packing in ("", *COMPRESSIONS)}


def _is_beside(parts: list[str]) -> bool:
    return any(part.startswith((".", "_")) for part in parts[:-1]) or _BESIDE.fullmatch(parts[-1]) is not None
