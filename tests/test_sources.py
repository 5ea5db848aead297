"""Every format against an independent reader, on real files: nothing lost, nothing twice, bad rows named."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import random
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from collector import plan, sources
from collector.config import CaptureConfig, DataConfig, ModelConfig, RunConfig
from collector.formats import REASONS, lines
from collector.sources import BadRow, Document, files

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HUGE = 10**6


def config(*specs: object, **data) -> RunConfig:
    settings = DataConfig(data=tuple(map(str, specs)), **data)
    return RunConfig(data=settings, model=ModelConfig(), capture=CaptureConfig(), device="cpu")


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


@pytest.mark.parametrize("every", [1, 3, HUGE])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_every_row_once_and_in_order(tmp_path: Path, kind: str, every: int) -> None:
    got = read(write(tmp_path, kind), docs_per_shard=every)
    assert [{"text": row.text, "label": row.label, "id": row.id} for row in got] == ROWS
    assert {row.source for row in got} == {f"rows.{kind}"}


@pytest.mark.parametrize("every", [1, 3, HUGE])
def test_plain_text_takes_its_label_from_the_file(tmp_path: Path, every: int) -> None:
    (tmp_path / "deu_Latn.dev.txt").write_bytes("eins\r\nzwei é\n\nvier".encode())
    (tmp_path / "eng_Latn.devtest").write_text("one\n", encoding="utf-8")
    got = read(tmp_path / "*", docs_per_shard=every)
    expected = [("eins", "deu_Latn"), ("zwei é", "deu_Latn"), "empty text", ("vier", "deu_Latn"), ("one", "eng_Latn")]
    assert brief(got) == expected
    assert [row.id for row in got if isinstance(row, Document)] == [
        *(f"deu_Latn.dev.txt#{row}" for row in (0, 1, 3)), "eng_Latn.devtest#0"
    ]  # fmt: skip
    assert got[2] == BadRow(where="deu_Latn.dev.txt#2", reason="empty text")


# -- arbitrary content -------------------------------------------------------------------------------

ends = st.sampled_from([b"\n", b"\r\n"])
sizes = st.sampled_from([1, 2, 3, HUGE])
words = st.text(max_size=12)
BAD_JSON = {
    b"": "empty line", b"  ": "empty line", b'{"text": "x"': "invalid JSON", b"[" * 3000: "invalid JSON",
    b"[1]": "not an object", b'"x"': "not an object", b'{"text": "\xff", "label": "x"}': "invalid UTF-8",
    b'{"label": "x"}': "no text", b'{"text": null, "label": "x"}': "no text", b'{"text": "x"}': "no label",
    b'{"text": 5, "label": "x"}': "text is not a string", b'{"text": " \\n", "label": "x"}': "empty text",
    b'{"text": "x", "label": ""}': "no label", b'{"text": "\\ud800", "label": "x"}': "invalid UTF-8",
    b'{"text": "x", "label": ["y"]}': "label is not a string or number",
}  # fmt: skip


def expected_of(text: str, label: str) -> tuple[str, str] | str:
    return "empty text" if not text.strip() else "no label" if not label.strip() else (text, label)


def json_line(text: str, label: str, ascii_only: bool) -> tuple[bytes, object]:
    line = json.dumps({"label": label, "text": text, "more": [1, {}]}, ensure_ascii=ascii_only)
    return line.encode(), expected_of(text, label)


def raw_line(text: str, label: str, separator: str, order: int) -> tuple[bytes, object]:
    for character in "\n\r\t":
        text, label = text.replace(character, " "), label.replace(character, " ")
    return separator.join([text, label][:: -1 if order else 1]).encode(), expected_of(text, label)


def assemble(lines: list[tuple[bytes, bytes]], mark: bool, last_ended: bool) -> bytes:
    body = b"".join(line + end for line, end in lines)
    if lines and not last_ended:
        body = body.removesuffix(lines[-1][1])
    return (b"\xef\xbb\xbf" if mark else b"") + body


def check(path: Path, content: bytes, expected: list[object], **data) -> None:
    path.write_bytes(content)
    if not expected:
        with pytest.raises(ValueError, match="no row at all"):
            read(path, **data)
        return
    assert brief(read(path, **data)) == expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("property")


json_rows = st.one_of(st.builds(json_line, words, words, st.booleans()), st.sampled_from(sorted(BAD_JSON.items())))


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(json_rows, ends), max_size=8), st.booleans(), st.booleans(), sizes)
def test_any_json_lines(folder: Path, rows, mark: bool, last_ended: bool, every: int) -> None:
    expected = [row[1] for row, _ in rows]
    if rows and not last_ended and rows[-1][0][0] == b"":
        expected.pop()
    content = assemble([(row[0], end) for row, end in rows], mark, last_ended)
    check(folder / "any.jsonl", content, expected, docs_per_shard=every)


tsv_rows = st.one_of(
    st.builds(raw_line, words, words, st.just("\t"), st.just(0)),
    st.sampled_from([(b"", "empty line"), (b"a", "wrong number of columns"), (b"a\tb\tc", "wrong number of columns"),
                     (b"\xff\tx", "invalid UTF-8"), (b'"a\tb', ('"a', "b"))]),
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(tsv_rows, ends), min_size=1, max_size=8), st.booleans(), st.booleans(), sizes)
def test_any_tsv(folder: Path, rows, mark: bool, last_ended: bool, every: int) -> None:
    expected = [row[1] for row, _ in rows]
    if not last_ended and rows[-1][0][0] == b"":
        expected.pop()
    content = assemble([(b"text\tlabel", b"\n"), *((row[0], end) for row, end in rows)], mark, last_ended)
    check(folder / "any.tsv", content, expected, docs_per_shard=every)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.text(max_size=12), ends), max_size=8), st.booleans(), sizes)
def test_any_plain_text(folder: Path, rows, last_ended: bool, every: int) -> None:
    lines = [(text.replace("\n", " ").removesuffix("\r").removeprefix("\ufeff"), end) for text, end in rows]
    assume(not any(text.endswith("\r") for text, _ in lines))
    expected = [expected_of(text, "any") for text, _ in lines]
    if lines and not last_ended and lines[-1][0] == "":
        expected.pop()
    content = assemble([(text.encode(), end) for text, end in lines], False, last_ended)
    check(folder / "any.txt", content, expected, docs_per_shard=every)


def csv_row(text: str, label: str, end: bytes) -> tuple[bytes, object]:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, quoting=csv.QUOTE_ALL, lineterminator=end.decode()).writerow([label, text])
    return buffer.getvalue().encode(), expected_of(text, label)


csv_rows = st.one_of(
    st.builds(csv_row, words, words, ends),
    st.sampled_from([(b"\n", "empty line"), (b"\r\n", "empty line"), (b"a,b,c\n", "wrong number of columns"),
                     (b"x,\xff\n", "invalid UTF-8"), (b"x,a\rb\n", "invalid CSV"),
                     (b'x,"two\nlines"\r\n', ("two\nlines", "x")),
                     (b'x,a "b" c\n', ('a "b" c', "x")), (b'x,"a\nb"\rc\n', "invalid CSV")]),
)  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(st.lists(csv_rows, max_size=8), st.booleans(), sizes)
def test_any_csv(folder: Path, rows, mark: bool, every: int) -> None:
    content = assemble([(b"label,text", b"\r\n"), *((row, b"") for row, _ in rows)], mark, True)
    check(folder / "any.csv", content, [expected for _, expected in rows], docs_per_shard=every)


@settings(deadline=None, max_examples=120)
@given(st.lists(st.sampled_from([b'"', b",", b"\n", b"\r", b"\t", b"a", b"{", b"\xc3", b"\xa4"]), max_size=40))
def test_where_rows_begin_does_not_depend_on_the_cut(folder: Path, pieces: list[bytes]) -> None:
    for kind in ("csv", "tsv", "txt", "jsonl"):
        path = folder / f"cut.{kind}"
        path.write_bytes(b"x,\t\n"[: 4 if kind in ("csv", "tsv") else 0] + b"".join(pieces))
        columns = {"text_column": "0", "label_column": "@file"}
        try:
            whole = read(path, docs_per_shard=HUGE, **columns)
        except ValueError as error:
            assert "no row at all" in str(error)  # noqa: PT017
            continue
        for every in (1, 2, 3):
            assert read(path, docs_per_shard=every, **columns) == whole


# -- bytes and blocks --------------------------------------------------------------------------------


def test_line_ends_at_the_edges_of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "_SCAN_BLOCK", 7)
    texts = ["ü" * n for n in random.Random(1).choices(range(1, 30), k=60)]
    (tmp_path / "a.txt").write_text("\n".join(texts), encoding="utf-8")
    for every in (1, 4):
        assert [row.text for row in read(tmp_path / "a.txt", docs_per_shard=every)] == texts


def test_lines_longer_than_a_block(tmp_path: Path) -> None:
    texts = ["short", "é" * (3 << 20), "", "x" * (5 << 20), "end"]
    (tmp_path / "a.txt").write_text("\n".join(texts), encoding="utf-8")
    for every in (1, 2):
        assert brief(read(tmp_path / "a.txt", docs_per_shard=every)) == [expected_of(text, "a") for text in texts]


def test_a_csv_field_longer_than_pythons_limit(tmp_path: Path) -> None:
    (tmp_path / "book.csv").write_text('text,label\n"' + "word, " * 100_000 + '",eng\nshort,eng\n', encoding="utf-8")
    assert [len(row.text) for row in read(tmp_path / "book.csv", docs_per_shard=1)] == [600_000, 5]


def test_a_csv_quote_that_never_closes_is_reported(tmp_path: Path) -> None:
    (tmp_path / "open.csv").write_text('text,label\nfine,eng\n"open,eng\nnext,eng\n', encoding="utf-8")
    assert brief(read(tmp_path / "open.csv")) == [("fine", "eng"), "invalid CSV"]


def test_csv_as_the_csv_module_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "odd.csv"
    path.write_bytes(b'label,text\r\nx,"a ""b"", c"\r\nx,"line\r\nline"\r\nx, spaced \r\nx,"a"b\r\nx,5" disk\r\n')
    with path.open(newline="", encoding="utf-8") as file:
        expected = [(row["text"], row["label"]) for row in csv.DictReader(file)]
    for every in (1, 2, HUGE):
        assert brief(read(path, docs_per_shard=every)) == expected


def test_reasons_are_a_closed_set_and_hold_no_text(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(BAD_JSON) + b'\n{"text": 1, "secret": 2}\n')
    bad = read(tmp_path / "bad.jsonl")
    assert all(isinstance(row, BadRow) and row.reason in REASONS for row in bad)
    assert [row.where for row in bad] == [f"bad.jsonl#{i}" for i in range(len(BAD_JSON) + 1)]


# -- columns -----------------------------------------------------------------------------------------


def test_named_columns_and_values_that_are_no_strings(tmp_path: Path) -> None:
    row = {"satz": "Text", "sprache": 7, "nr": 3, "parallel_id": 12, "source": "wiki"}
    (tmp_path / "a.jsonl").write_text(
        json.dumps(row) + "\n" + json.dumps({"satz": "ohne", "sprache": "x"}), encoding="utf-8"
    )
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    columns = {"text_column": "satz", "label_column": "sprache", "id_column": "nr"}
    full = Document(text="Text", label="7", id="3", parallel_id="12", source="wiki")
    assert read(tmp_path / "a.parquet", **columns) == [full]
    plain = Document(text="ohne", label="x", id="a.jsonl#1", parallel_id=None, source="a.jsonl")
    assert read(tmp_path / "a.jsonl", **columns) == [full, plain]


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_positions_mean_that_there_is_no_header(tmp_path: Path, kind: str) -> None:
    separator = "," if kind == "csv" else "\t"
    (tmp_path / f"eng.{kind}").write_text(f"en{separator}one\nen{separator}two\n", encoding="utf-8")
    assert brief(read(tmp_path / f"eng.{kind}", text_column="1", label_column="0")) == [("one", "en"), ("two", "en")]
    assert brief(read(tmp_path / f"eng.{kind}", text_column="1", label_column="@file")) == [
        ("one", "eng"),
        ("two", "eng"),
    ]
    with pytest.raises(ValueError, match=r"no column 'label'; it has 0, 1: set --label-column, or @file"):
        read(tmp_path / f"eng.{kind}", text_column="1")


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "saved"])
def test_a_missing_column_names_those_there_are(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "saved" if kind == "saved" else tmp_path
    if kind == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    else:
        path = write(tmp_path, kind)
    with pytest.raises(ValueError, match=r"no column 'body'; it has text, label, id: set --text-column"):
        read(path, text_column="body")
    with pytest.raises(ValueError, match=r"no column 'lang'.*--label-column, or @file"):
        read(path, label_column="lang")
    with pytest.raises(ValueError, match=r"no column 'key'.*--id-column"):
        read(path, id_column="key")
    assert {row.label for row in read(path, label_column="@file")} == {path.name.split(".")[0]}


def test_a_json_array_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    with pytest.raises(ValueError, match="one JSON array"):
        read(tmp_path / "a.json")


def test_parquet_strings_that_are_not_utf8(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"\xff", None], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"text": text, "label": ["x"] * 3}), tmp_path / "a.parquet")
    assert brief(read(tmp_path / "a.parquet")) == [("good", "x"), "invalid UTF-8", "no text"]


def test_parquet_reads_only_the_row_groups_of_a_shard(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet")
    settings = config(path, docs_per_shard=5)
    made = plan.make_plan(settings)
    chunk = pq.ParquetFile(path).metadata.row_group(2).column(0)
    content = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(content)
    now = sources.fingerprint(sources.resolve(settings.data)[0])
    for shard in (dataclasses.replace(shard, fingerprint=now) for shard in made.shards):
        if shard.first_row == 10:
            with pytest.raises((OSError, pa.ArrowException)):
                list(plan.read_shard(shard, settings.data))
        else:
            got = [row.id for row in plan.read_shard(shard, settings.data)]
            assert got == [row["id"] for row in ROWS[shard.first_row : shard.first_row + 5]]


# -- where the files are -----------------------------------------------------------------------------


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
    (tmp_path / "a.jsonl.gz").touch()
    (tmp_path / "empty.csv").touch()
    for spec, message in {
        tmp_path / "*.csvx": r"no file matches .*\*\.csvx",
        tmp_path / "absent.jsonl": "no file matches",
        tmp_path: r"is a folder: give a glob such as .*\*\.jsonl, or hf:",
        tmp_path / "a.jsonl.gz": r"\.gz files are not supported.*decompress",
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
    with pytest.raises(ValueError, match="is a folder"):
        read(f"{folder}/deep")
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
    filesystem, path = files._filesystem("s3://bucket/a/b.jsonl")
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
