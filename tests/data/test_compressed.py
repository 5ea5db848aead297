"""Compressed text files give the same rows as unpacked ones, and are unpacked about once."""

from __future__ import annotations

import gzip
import random
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import datasets
import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collector.data import plan, sources
from collector.data.sources import compressed, files
from tests.helpers.documents import ENDINGS, HUGE, ROWS, brief, config, count_bytes, json_lines, pack, read, write

if TYPE_CHECKING:
    from pathlib import Path

# -- the same rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3, HUGE])
@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_every_row_once_and_in_order(tmp_path: Path, kind: str, ending: str, pieces: int, every: int) -> None:
    path = pack(write(tmp_path, kind), ending, pieces)
    got = read(path, docs_per_shard=every)
    assert [{"text": row.text, "label": row.label, "id": row.id} for row in got] == ROWS
    assert {row.source for row in got} == {f"rows.{kind}.{ending}"}
    shard = plan.make_plan(config(path)).shards[0]
    assert shard.kind == f"{kind}.{ending}"
    assert shard.fingerprint == files.fingerprint(str(path))


@pytest.mark.parametrize("ending", ENDINGS)
def test_plain_text_takes_its_label_from_the_file(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "deu_Latn.dev"
    path.write_bytes(b"\xef\xbb\xbfeins\r\nzwei")
    assert brief(read(pack(path, ending))) == [("eins", "deu_Latn"), ("zwei", "deu_Latn")]


@pytest.mark.parametrize("ending", ENDINGS)
@settings(deadline=None, max_examples=60)
@given(
    content=st.lists(st.sampled_from([b"a", b'"', b",", b"\n", b"\r\n", b"\xc3\xa4", b"\0", b"{}"]), max_size=60),
    pieces=st.integers(1, 5),
    every=st.sampled_from([1, 2, 3]),
)
def test_any_content_in_any_members(tmp_path_factory, ending: str, content: list[bytes], pieces: int, every: int):
    folder = tmp_path_factory.mktemp("any")
    for kind in ("csv", "tsv", "txt", "jsonl"):
        plain = folder / f"any.{kind}"
        plain.write_bytes(b"0,\t\n"[: 4 if kind in ("csv", "tsv") else 0] + b"".join(content) + b"end")
        columns = {"text_column": "0", "label_column": "@file", "docs_per_shard": every}
        expected = brief(read(plain, **columns))
        assert brief(read(pack(plain, ending, pieces), **columns)) == expected
    shutil.rmtree(folder)


@pytest.mark.parametrize("ending", ENDINGS)
def test_shards_in_any_order(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "_BLOCK", 3000)
    path = pack(json_lines(tmp_path / "a.jsonl", 500), ending, 3)
    settings = config(path, docs_per_shard=7)
    shards = list(plan.make_plan(settings).shards)
    random.Random(3).shuffle(shards)
    numbers = {shard.first_row: list(plan.read_shard(shard, settings.data)) for shard in shards}
    assert [int(row.text.split()[0]) for first in sorted(numbers) for row in numbers[first]] == list(range(500))


@pytest.mark.parametrize("ending", ENDINGS)
def test_two_readers_of_one_file_do_not_disturb_each_other(tmp_path: Path, ending: str) -> None:
    path = pack(json_lines(tmp_path / "a.jsonl", 20_000), ending)
    settings = config(path, docs_per_shard=5000)
    shards = plan.make_plan(settings).shards
    both = zip(*(plan.read_shard(shard, settings.data) for shard in shards[1:3]), strict=True)
    numbers = [[int(row.text.split()[0]) for row in pair] for pair in both]
    assert numbers == [[5000 + i, 10_000 + i] for i in range(5000)]


def test_selection_and_urls(tmp_path: Path) -> None:
    path = pack(write(tmp_path, "jsonl"), "gz")
    assert [row.id for row in read(path, per_label=2, docs_per_shard=4)] == [f"doc-{i}" for i in range(6)]
    assert [row.id for row in read(path, limit=5, docs_per_shard=4)] == [f"doc-{i}" for i in range(5)]
    url = f"memory://packed-{tmp_path.name}/rows.jsonl.gz"
    fsspec.filesystem("memory").pipe_file(url, path.read_bytes())
    assert [row.id for row in read(url, docs_per_shard=4)] == [row["id"] for row in ROWS]


def test_compressed_files_of_a_dataset(tmp_path: Path) -> None:
    path = pack(write(tmp_path, "jsonl"), "gz")
    path.rename(tmp_path / "train.json.gz")
    assert [row.id for row in read(f"hf:{tmp_path}")] == [row["id"] for row in ROWS]
    (tmp_path / "train.json.gz").write_bytes(gzip.compress(b'[{"text": "x", "label": "y"}]'))
    datasets.disable_progress_bars()
    assert brief(read(f"hf:{tmp_path}")) == [("x", "y")]


# -- how often a file is unpacked --------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
def test_shards_in_order_unpack_a_file_once(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(json_lines(tmp_path / "a.jsonl", 40_000), ending)
    settings = config(path, docs_per_shard=500)
    shards = plan.make_plan(settings).shards
    bytes_read = count_bytes(monkeypatch)
    files.fingerprint(str(path))
    fingerprinting = sum(bytes_read) * len(shards)
    bytes_read.clear()
    for shard in shards:
        assert len(list(plan.read_shard(shard, settings.data))) == 500
    unpacking = sum(bytes_read) - fingerprinting
    assert path.stat().st_size <= unpacking <= 1.1 * path.stat().st_size


def test_few_files_stay_open(tmp_path: Path) -> None:
    paths = [pack(json_lines(tmp_path / f"{i}.jsonl", 50), "gz") for i in range(12)]
    settings = config(*paths, docs_per_shard=10)
    for shard in plan.make_plan(settings).shards:
        list(plan.read_shard(shard, settings.data))
    kept = compressed._kept._readers
    assert len(kept) == compressed._KEPT_FILES
    assert {key[0] for key in kept} == {str(path) for path in paths[-4:]}


def test_a_file_that_was_replaced_is_not_read_from_the_old_one(tmp_path: Path) -> None:
    path = pack(json_lines(tmp_path / "a.jsonl", 30), "gz")
    settings = config(path, docs_per_shard=10)
    old = plan.make_plan(settings)
    list(plan.read_shard(old.shards[0], settings.data))
    path.write_bytes(gzip.compress(b'{"text": "new", "label": "y"}\n' * 30))
    with pytest.raises(ValueError, match="source changed"):
        list(plan.read_shard(old.shards[1], settings.data))
    assert brief(read(path, docs_per_shard=10)) == [("new", "y")] * 30


def test_an_interrupted_read_is_not_taken_for_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(json_lines(tmp_path / "a.jsonl", 30_000), "gz")
    settings = config(path, docs_per_shard=15_000)
    shards = plan.make_plan(settings).shards
    opened, broken = files.open_file, iter([True])

    def once_broken(location: str, *, scattered: bool = False):
        file = opened(location, scattered=scattered)
        if next(broken, False):
            file.seek(path.stat().st_size)
            file.close()
        return file

    now = sources.fingerprint(sources.resolve(settings.data)[0])
    monkeypatch.setattr(files, "fingerprint", lambda _: now)
    monkeypatch.setattr(files, "open_file", once_broken)
    with pytest.raises(ValueError, match="closed file"):
        list(plan.read_shard(shards[0], settings.data))
    assert [len(list(plan.read_shard(shard, settings.data))) for shard in shards] == [15_000, 15_000]


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """400 MB of text in 400 kB, one short row after the other."""
    path = tmp_path / "a.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(400):
            file.write(b"a line of text\n" * 70_000)
    program = (
        "import resource, sys; from collector.data import plan; from tests.helpers.documents import config\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "settings = config(sys.argv[1], docs_per_shard=100_000)\n"
        "made = plan.make_plan(settings)\n"
        "assert made.documents == 28_000_000, made.documents\n"
        "last = sum(1 for _ in plan.read_shard(made.shards[-1], settings.data))\n"
        "assert last == 100_000\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    grown = subprocess.run([sys.executable, "-c", program, str(path)], check=True, capture_output=True, text=True)
    assert int(grown.stdout) < 80_000, "KiB"
