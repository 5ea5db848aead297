"""Files of documents in every format, and how tests read them: through the plan, shard by shard."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import sys
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from collector.config import CaptureConfig, DataConfig, ModelConfig, RunConfig
from collector.data import plan
from collector.data.sources import BadRow, Document, files

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest

HUGE = 10**6


def config(*specs: object, max_length: int = 512, **data) -> RunConfig:
    settings = DataConfig(data=tuple(map(str, specs)), **data)
    return RunConfig(data=settings, model=ModelConfig(), capture=CaptureConfig(max_length=max_length), device="cpu")


def read(*specs: object, **data) -> list[Document | BadRow]:
    """The union of all shards, in order; every shard has rows, and the numbers that the plan promises."""
    settings = config(*specs, **data)
    made = plan.make_plan(settings)
    shards = [list(plan.read_shard(shard, settings.data)) for shard in made.shards]
    assert [len(rows) for rows in shards] == [shard.planned for shard in made.shards]
    assert [shard.shard for shard in made.shards] == list(range(len(shards)))
    assert all(shards)
    return [row for rows in shards for row in rows]


def brief(rows: list[Document | BadRow]) -> list[tuple[str, str] | str]:
    return [(row.text, row.label) if isinstance(row, Document) else row.reason for row in rows]


TEXTS = [
    "plain",
    "Zeile mit Umlaut äöü",
    "日本語のテキスト",
    "🙂 emoji",
    "tab-free, comma",
    'a "quoted" word',
    "x" * 5000,
]
ROWS = [{"text": TEXTS[i % 7] + f" {i}", "label": f"l{i % 3}", "id": f"doc-{i}"} for i in range(23)]
BODIES = {
    "jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS),
    "tsv": "text\tlabel\tid\n" + "".join("\t".join(row.values()) + "\n" for row in ROWS),
}


def write(folder: Path, kind: str) -> Path:
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=5)
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label", "id"])
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        path.write_text(BODIES[kind], encoding="utf-8")
    return path


def expected_of(text: str, label: str) -> tuple[str, str] | str:
    if not text.strip():
        return "empty text"
    return "no label" if not label.strip() else "label contains ␟" if "␟" in label else (text, label)


BAD_JSON = {
    b"": "empty line", b"  ": "empty line", b'{"text": "x"': "invalid JSON", b"[" * 3000: "invalid JSON",
    b"[1]": "not an object", b'"x"': "not an object", b'{"text": "\xff", "label": "x"}': "invalid UTF-8",
    b'{"label": "x"}': "no text", b'{"text": null, "label": "x"}': "no text", b'{"text": "x"}': "no label",
    b'{"text": 5, "label": "x"}': "text is not a string", b'{"text": " \\n", "label": "x"}': "empty text",
    b'{"text": "x", "label": ""}': "no label", b'{"text": "\\ud800", "label": "x"}': "invalid UTF-8",
    b'{"text": "x", "label": ["y", {}]}': "label is not a string or number",
}  # fmt: skip


GOOD = [(f"text {i}", f"l{i % 3}") for i in range(20)]


def write_pairs(path: Path, rows: list[tuple[str, str] | None]) -> Path:
    """JSON lines; None is a row that is not JSON."""
    lines = ["{" if row is None else json.dumps({"text": row[0], "label": row[1]}) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


PACK: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": zstd.compress}
ENDINGS = sorted(PACK)


def pack(path: Path, ending: str, pieces: int = 1) -> Path:
    """The file compressed beside itself, in several members that end where they happen to."""
    content = path.read_bytes()
    size = -(-len(content) // pieces)
    packed = path.with_name(f"{path.name}.{ending}")
    packed.write_bytes(b"".join(PACK[ending](content[i : i + size]) for i in range(0, len(content), size)))
    path.unlink()
    return packed


def json_lines(path: Path, rows: int) -> Path:
    """Rows that hardly compress, so that a file is damaged where it is cut."""
    random_text = random.Random(5)
    lines = [f'{{"text": "{i} {random_text.randbytes(60).hex()}", "label": "x"}}\n' for i in range(rows)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


class CountedFile(io.FileIO):
    """A file that notes how many bytes each reading took."""

    def __init__(self, path: str, sizes: list[int]) -> None:
        super().__init__(path)
        self._sizes = sizes

    def readinto(self, buffer) -> int:
        size = super().readinto(buffer)
        self._sizes.append(size)
        return size


def count_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of all readings of sources from here on."""
    sizes: list[int] = []

    def opened(location: str, *, scattered: bool = False) -> io.BufferedReader:
        return io.BufferedReader(CountedFile(location, sizes), buffer_size=1 if scattered else io.DEFAULT_BUFFER_SIZE)

    monkeypatch.setattr(files, "open_file", opened)
    return sizes
