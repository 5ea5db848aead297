"""Writes a folder that appears as a whole, under its name, or not at all."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def new_folder(out: str) -> Path:
    """Returns the path of a folder to write.

    Raises:
        ValueError: it is on an object store, or it exists and is not an empty folder.
    """
    if "://" in out:
        raise ValueError(f"an export goes to a local folder, got {out}; copy that to the store with its own client")
    target = Path(out).absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder: give another one, or remove it")
    return target


@contextlib.contextmanager
def built_beside(target: Path) -> Iterator[Path]:
    """Yields a temporary folder next to `target`; renames it to `target` at the end, or removes it after an error."""
    folder = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def size_of(folder: Path) -> int:
    """Returns the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
