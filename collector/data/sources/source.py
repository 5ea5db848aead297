"""Names a source of documents, and what its reader must know of it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One file, saved folder, or split of the embedded corpus; of a wide file, one of its texts."""

    location: str
    """Absolute path, URL, or `demo:SPLIT`."""
    name: str
    """The source's part of a document's default id: the location without the folder common to all sources."""
    kind: str
    """Format: jsonl, csv, tsv, parquet, txt, demo or saved; text formats may be followed by `.gz` or `.zst`."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """How to read it, as JSON values: `text` and `column`, of a wide file the text column and what tells it from the
    others; `names`, the classes' names of columns that hold their numbers."""

    @property
    def format(self) -> str:
        """The kind without its compression."""
        return self.kind.partition(".")[0]

    @property
    def compression(self) -> str:
        """`gz`, `zst`, or an empty string."""
        return self.kind.partition(".")[2]

    @property
    def is_file(self) -> bool:
        """Whether the source is a file or folder, rather than the embedded corpus."""
        return self.kind != "demo"
