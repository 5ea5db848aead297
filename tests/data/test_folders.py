"""Folders, globs and odd names: which files a value of `--data` denotes, local or behind a URL."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import boto3
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from collector.data import sources
from tests.helpers.documents import config, read

LINE = '{"text": "x", "label": "y"}\n'


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(LINE, encoding="utf-8")
    return folder


def names(spec: object) -> list[str]:
    return [source.name for source in sources.resolve(config(spec).data)]


BESIDE = (".hidden.jsonl", ".cache/a.jsonl", "_SUCCESS", "_temporary/0.jsonl", "README.md", "readme.txt", "LICENSE",
          "x/README", "dataset_infos.json", "dataset_dict.json", "SHA256SUMS", "a.jsonl.md5", "checksums.txt",
          "CITATION.cff")  # fmt: skip


def test_a_folder_of_one_kind_is_read_whole_and_sorted(tmp_path: Path) -> None:
    fill(tmp_path, "b/2.jsonl", "a/9.ndjson", "b/10.jsonl", "b/deep/er/c.jsonl", "en.2024.jsonl", *BESIDE)
    assert names(tmp_path) == ["a/9.ndjson", "b/10.jsonl", "b/2.jsonl", "b/deep/er/c.jsonl", "en.2024.jsonl"]
    assert [row.id for row in read(f"{tmp_path}/")] == [f"{name}#0" for name in names(tmp_path)]


def test_a_folder_behind_a_url(tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    for name in ("b/2.jsonl", "a/9.jsonl", *BESIDE):
        files.pipe_file(f"memory://{tmp_path.name}/{name}", LINE.encode())
    assert [row.id for row in read(f"memory://{tmp_path.name}")] == ["a/9.jsonl#0", "b/2.jsonl#0"]
    files.pipe_file(f"memory://{tmp_path.name}/c.csv", b"text,label\n")
    with pytest.raises(ValueError, match=r"several kinds of files \(2 \.jsonl, 1 \.csv\)"):
        read(f"memory://{tmp_path.name}")


def test_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "ENDPOINT_URL": f"http://{host}:{port}",
        "ALLOW_HTTP": "true",
        "REGION": "us-east-1",
        "ACCESS_KEY_ID": "testing",
        "SECRET_ACCESS_KEY": "testing",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
    client.create_bucket(Bucket="folders")
    for key in ("a [1]/", "a [1]/x/1.jsonl", "a [1]/2.jsonl", "a [1]/_SUCCESS", "a 1/other.jsonl", "b/q?.jsonl"):
        client.put_object(
            Bucket="folders", Key=key, Body=b"" if key.endswith(("/", "S")) else gzip.compress(LINE.encode())
        )
    for spec, found in {
        "": ["a 1/other.jsonl", "a [1]/2.jsonl", "a [1]/x/1.jsonl", "b/q?.jsonl"],
        "/a [1]": ["2.jsonl", "x/1.jsonl"],
        "/a [1]/": ["2.jsonl", "x/1.jsonl"],
        "/a [1]/*.jsonl": ["2.jsonl"],
        "/a ?/*": ["other.jsonl"],
        "/b/q?.jsonl": ["q?.jsonl"],
    }.items():
        assert [row.id for row in read(f"s3://folders{spec}")] == [f"{name}#0" for name in found]
    server.stop()


def test_hive_folders_and_spark(tmp_path: Path) -> None:
    for language in ("de", "en"):
        path = tmp_path / "texts.parquet" / f"lang={language}" / "part-0.c000.snappy.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table({"text": [language]}), path)
    fill(tmp_path / "texts.parquet", "_SUCCESS", "lang=de/.part-0.crc")
    got = read(tmp_path / "texts.parquet", label_column="@file")
    assert [(row.id, row.text) for row in got] == [
        (f"lang={language}/part-0.c000.snappy.parquet#0", language) for language in ("de", "en")
    ]


def test_files_without_an_ending_are_what_their_content_is(tmp_path: Path) -> None:
    fill(tmp_path, "part-00000", "part-00001")
    assert [row.text for row in read(tmp_path)] == ["x", "x"]


def test_a_folder_of_several_kinds_names_them_and_their_globs(tmp_path: Path) -> None:
    fill(tmp_path, "a.jsonl", "b.jsonl", "b.jsonl.gz", "c.csv", "notes")
    with pytest.raises(
        ValueError,
        match=r"is a folder of several kinds of files \(2 \.jsonl, .*1 without an ending\): choose one with a glob, "
        r"such as '.*/\*\*/\*\.jsonl' or '.*/\*\*/\*\.",
    ):
        read(tmp_path)
    assert len(read(f"{tmp_path}/**/*.jsonl")) == 2
    for name, message in {
        "nothing/README.md": "is a folder without data files",
        "delta/_delta_log/0.json": "Delta",
    }.items():
        folder = fill(tmp_path / "odd" / name.split("/")[0], name.partition("/")[2])
        with pytest.raises(ValueError, match=message):
            read(folder)


ODD = ["[2024] texts/a.jsonl", "what?/a.jsonl", "a*b/a.jsonl", "two words/a [1].jsonl", "[!x]/[a-c].jsonl"]


@pytest.mark.parametrize("name", ODD)
def test_a_name_that_exists_is_literal(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, name, "2 texts/other.jsonl", "whatx/other.jsonl", "aab/other.jsonl", "n/b.jsonl", "n/b [1].jsonl")
    monkeypatch.chdir(tmp_path)
    for spec in (name, tmp_path / name, f"{Path(name).parent}/*.jsonl", Path(name).parent):
        assert [source.location for source in sources.resolve(config(spec).data)] == [str(tmp_path / name)]
    remote = fsspec.filesystem("memory")
    folder = f"memory://{tmp_path.name}"
    for each in (name, "2 texts/other.jsonl", "aab/other.jsonl"):
        remote.pipe_file(f"{folder}/{each}", LINE.encode())
    for spec in (name, f"{Path(name).parent}/*.jsonl"):
        (found,) = sources.resolve(config(f"{folder}/{spec}").data)
        assert found.location.replace(":///", "://") == f"{folder}/{name}"


def test_wildcards(tmp_path: Path) -> None:
    fill(tmp_path, "1.jsonl", "2.jsonl", "a/3.jsonl", ".hidden.jsonl", ".git/x.jsonl", "a/b/4.jsonl")
    for spec, found in {
        "*.jsonl": ["1.jsonl", "2.jsonl"],
        "[13].jsonl": ["1.jsonl"],
        "?.jsonl": ["1.jsonl", "2.jsonl"],
        "**/*.jsonl": ["1.jsonl", "2.jsonl", "a/3.jsonl", "a/b/4.jsonl"],
        "a/**": ["3.jsonl", "b/4.jsonl"],
        ".*.jsonl": [".hidden.jsonl"],
        "*/[!4].jsonl": ["3.jsonl"],
    }.items():
        assert names(tmp_path / spec) == found
        remote = fsspec.filesystem("memory")
        for path in tmp_path.rglob("*.jsonl"):
            remote.pipe_file(f"memory://{tmp_path.name}/{path.relative_to(tmp_path)}", LINE.encode())
        assert names(f"memory://{tmp_path.name}/{spec}") == found
    with pytest.raises(ValueError, match="matches folders alone: give one folder, or a glob of files such as"):
        names(tmp_path / "[a]")


def test_links(tmp_path: Path) -> None:
    fill(tmp_path, "blobs/0", "blobs/1", "more/x.jsonl")
    (tmp_path / "data").mkdir()
    for number in range(2):
        (tmp_path / "data" / f"{number}.jsonl").symlink_to(tmp_path / "blobs" / str(number))
    for spec in ("data", "data/*.jsonl"):
        assert names(tmp_path / spec) == ["0.jsonl", "1.jsonl"]
    (tmp_path / "data" / "more").symlink_to(tmp_path / "more")
    (tmp_path / "more" / "circle").symlink_to(tmp_path / "data")
    assert names(tmp_path / "data") == ["0.jsonl", "1.jsonl", "more/x.jsonl"]
    (tmp_path / "data" / "2.jsonl").symlink_to(tmp_path / "blobs" / "1")
    with pytest.raises(ValueError, match=r"names one file twice, as .*/1\.jsonl and as .*/2\.jsonl; give it once"):
        names(tmp_path / "data")
    (tmp_path / "data" / "2.jsonl").unlink()
    (tmp_path / "data" / "2.jsonl").symlink_to(tmp_path / "gone")
    for spec in ("data", "data/*.jsonl", "data/2.jsonl"):
        with pytest.raises(ValueError, match=r"2\.jsonl is a link to a file that does not exist"):
            names(tmp_path / spec)


def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.jsonl")
    for spec in (tmp_path / "fifo.jsonl", tmp_path / "*", tmp_path, "/dev/null", "/dev/stdin"):
        with pytest.raises(
            ValueError, match="is a pipe or device, which can be read only once: write its content to a"
        ):
            names(spec)
    reading, writing = os.pipe()  # as <(…) gives
    with pytest.raises(ValueError, match="is a pipe or device"):
        names(f"/dev/fd/{reading}")
    os.close(reading)
    os.close(writing)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_named(tmp_path: Path) -> None:
    (fill(tmp_path, "a.jsonl") / "a.jsonl").chmod(0)
    with pytest.raises(PermissionError, match=r"a\.jsonl"):
        read(tmp_path / "a.jsonl")
    fill(tmp_path, "b/c/a.jsonl")
    (tmp_path / "b" / "c").chmod(0)
    with pytest.raises(PermissionError, match="c"):
        read(tmp_path / "b")
    (tmp_path / "b" / "c").chmod(0o700)
