"""Where documents come from: files, globs, URLs, data sets of the Hugging Face hub, the embedded corpus."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from collector.data import plan, sources
from collector.data.sources import files
from tests.helpers.documents import HUGE, ROWS, brief, config, read, write

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def test_globs_are_sorted_and_names_are_relative_to_the_common_folder(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "a/9.jsonl", "b/10.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "x", "label": "y"}\n', encoding="utf-8")
    assert [row.id for row in read(tmp_path / "**" / "*.jsonl")] == ["a/9.jsonl#0", "b/10.jsonl#0", "b/2.jsonl#0"]
    assert [row.id for row in read(tmp_path / "b/2.jsonl", tmp_path / "a/*")] == ["b/2.jsonl#0", "a/9.jsonl#0"]


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "jsonl")
    monkeypatch.chdir(tmp_path)
    settings = config("./x/../rows.jsonl")
    assert plan.make_plan(settings).shards[0].source == str(path)


def test_what_is_no_source_says_what_to_do(tmp_path: Path) -> None:
    write(tmp_path, "jsonl")
    (tmp_path / "empty").mkdir()
    for name in ("a.jsonl.bz2", "a.tar.gz", "a.parquet.gz"):
        (tmp_path / name).touch()
    (tmp_path / "empty.csv").touch()
    for spec, message in {
        tmp_path / "*.csvx": r"no file matches .*\*\.csvx",
        tmp_path / "absent.jsonl": "no file matches",
        tmp_path: r"is a folder of several kinds of files \(.*1 \.jsonl.*\): choose one with a glob, such as",
        tmp_path / "empty": "is a folder without data files",
        tmp_path / "a.jsonl.bz2": r"\.bz2 files are not supported; decompress it, or compress it with gzip or zstd",
        tmp_path / "a.tar.gz": r"\.tar files are not supported; extract it",
        tmp_path / "a.parquet.gz": r"parquet files compress their own columns.*decompress it",
        tmp_path / "empty.csv": "no row at all",
        "demo:dev": "splits heldout, train, all",
        "zip://a.jsonl::x.zip": "files inside other files",
    }.items():
        with pytest.raises(ValueError, match=message):
            read(spec)
    with pytest.raises(ValueError, match=r"names .*rows\.jsonl 2 times"):
        read(tmp_path / "rows.jsonl", tmp_path / "*.jsonl")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_url(tmp_path: Path, kind: str) -> None:
    local = write(tmp_path, kind)
    folder = f"memory://bucket-{tmp_path.name}"
    fsspec.filesystem("memory").pipe_file(f"{folder}/deep/rows.{kind}", local.read_bytes())
    for spec in (f"{folder}/deep/rows.{kind}", f"{folder}/**/*.{kind}"):
        assert [row.id for row in read(spec, docs_per_shard=4)] == [row["id"] for row in ROWS]
    assert [row.id for row in read(f"{folder}/deep")] == [row["id"] for row in ROWS]
    with pytest.raises(ValueError, match="no file matches"):
        read(f"{folder}/none*")


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A server of byte ranges, with tags, over the files of the folder."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            content = (tmp_path / self.path.partition("?")[0].lstrip("/")).read_bytes()
            begin, _, end = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            part = content[int(begin) : int(end or len(content) - 1) + 1]
            self.send_response(206 if "Range" in self.headers else 200)
            self.send_header("Content-Length", str(len(part)))
            self.send_header("Content-Range", f"bytes {begin}-{int(begin) + len(part) - 1}/{len(content)}")
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", f'"{hash(content)}"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(part)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_web(tmp_path: Path, web: str, kind: str) -> None:
    write(tmp_path, kind)
    got = read(f"{web}/rows.{kind}?download=true", docs_per_shard=9)
    assert [row.id for row in got] == [row["id"] for row in ROWS]
    source = sources.resolve(config(f"{web}/rows.{kind}?download=true").data)[0]
    assert source.kind == kind
    assert sources.fingerprint(source).startswith("etag:")


def test_buckets_go_through_obstore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "none")
    filesystem, path = files.filesystem_of("s3://bucket/a/b.jsonl")
    assert (type(filesystem).__module__.split(".")[0], path) == ("obstore", "bucket/a/b.jsonl")


# -- Hugging Face ------------------------------------------------------------------------------------


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    """Two configs in two splits, as a dataset card declares them."""
    card = "---\nconfigs:\n"
    for language in ("en", "de"):
        card += f"- config_name: {language}\n  data_files:\n"
        for split in ("train", "test"):
            card += f"  - split: {split}\n    path: {language}/{split}-*.jsonl\n"
            for part in range(2):
                path = tmp_path / "hub" / language / f"{split}-{part}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                row = {"text": f"{language} {split} {part}", "label": language}
                path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    (tmp_path / "hub" / "README.md").write_text(card + "---\n", encoding="utf-8")
    return tmp_path / "hub"


def test_configs_and_splits_of_a_dataset(hub_folder: Path) -> None:
    for spec, start in {"en": "en train", "de:test": "de test", "en:train": "en train"}.items():
        assert [row.text for row in read(f"hf:{hub_folder}:{spec}")] == [f"{start} {part}" for part in range(2)]
    with pytest.raises(ValueError, match=r"no split 'dev'; there are splits train, test; configs en, de"):
        read(f"hf:{hub_folder}:en:dev")
    with pytest.raises(ValueError, match=r"available configs: \['en', 'de'\]"):
        read(f"hf:{hub_folder}:fr")
    with pytest.raises(ValueError, match="write hf:NAME"):
        read(f"hf:{hub_folder}:en:test:more")


def test_splits_of_a_folder_whose_name_has_a_colon(tmp_path: Path) -> None:
    folder = tmp_path / "odd:name"
    folder.mkdir()
    for split in ("train", "test"):
        pq.write_table(pa.table({"text": [split] * 3, "label": ["x", "y", "z"]}), folder / f"{split}.parquet")
    assert brief(read(f"hf:{folder}", docs_per_shard=2)) == [("train", "x"), ("train", "y"), ("train", "z")]
    assert (
        brief(read(f"hf:{folder}:test"))
        == brief(read(f"hf:{folder}::test"))
        == [("test", "x"), ("test", "y"), ("test", "z")]
    )


@pytest.mark.parametrize("every", [1, 3, HUGE])
def test_a_saved_dataset(tmp_path: Path, every: int) -> None:
    saved = datasets.Dataset.from_list(ROWS).select(range(5, 20))
    saved.save_to_disk(tmp_path / "saved", num_shards=2)
    got = read(tmp_path / "saved", docs_per_shard=every)
    assert [{"text": row.text, "label": row.label, "id": row.id} for row in got] == ROWS[5:20]
    assert [row.id for row in read(tmp_path / "saved", per_label=1)] == ["doc-5", "doc-6", "doc-7"]


def test_class_labels_of_a_saved_dataset_give_their_names(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["ko", "en"])})
    rows = {"text": ["a", "b", "c"], "label": ["en", "ko", None]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    assert brief(read(tmp_path / "saved")) == [("a", "en"), ("b", "ko"), "no label"]


def test_saved_splits_are_named_and_each_can_be_read(tmp_path: Path) -> None:
    part = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": part, "dev": part.select(range(2))}).save_to_disk(tmp_path / "all")
    with pytest.raises(ValueError, match=r"holds the splits dev, train: give one, such as .*all/dev"):
        read(tmp_path / "all")
    assert len(read(tmp_path / "all" / "train")) == len(ROWS)
    assert len(read(tmp_path / "all" / "dev")) == 2


# -- the embedded corpus -----------------------------------------------------------------------------


def test_the_embedded_corpus() -> None:
    heldout, train = read("demo"), read("demo:train", docs_per_shard=HUGE)
    assert read("demo:heldout", docs_per_shard=HUGE) == heldout
    labels = [row.label for row in heldout]
    assert {label: labels.count(label) for label in set(labels)} == dict.fromkeys(set(labels), 100)
    assert len(set(labels)) == 60
    assert {row.id for row in heldout}.isdisjoint(row.id for row in train)
    assert len({row.id for row in train}) == len(train) == 54_000
    assert plan.make_plan(config("demo:all")).documents == 60_000
    first = heldout[0]
    assert (first.id, first.source, first.parallel_id) == ("eld-1.0.6/am#9", "eld-1.0.6", None)
