"""Hostile input: each row becomes a document or is named with its reason, and nothing else happens."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from collector.config import DataConfig, ModelConfig
from collector.data import plan
from collector.data.formats import REASONS
from collector.data.sources import BadRow
from tests.helpers.documents import HUGE, brief, config, read
from tests.helpers.runs import collect_here, content, run_config

if TYPE_CHECKING:
    from pathlib import Path

    from collector.store.run_directory import RunDirectory

LABELS = [
    "../../x", "/tmp/label", "..", "", "a/b\\c", "שלום", "\u202eevil\u202c", "e\u0301\u0327\u0323", "\u1100\u1161",
    "a\0b", "two\nlines", "tab\there", " spaced ", "'; drop table documents; --", "%s {0} $x", "🙂", "\ufeff", "\u2028",
    "x" * 1000, "CON", "nan", "None", "-1",
]  # fmt: skip
LONG = 900_000
"""Words of the longest line, 4.5 MB: more than a block in which ends of lines are looked for."""
MARK = b"\xef\xbb\xbf"


def line(text: object = "some text", label: object = "x", **more: object) -> bytes:
    return json.dumps({"text": text, "label": label, **more}).encode()


def as_lines(*rows: bytes) -> bytes:
    return b"".join(row + b"\n" for row in rows)


# File -> content, and what becomes of each row.
CORPUS: dict[str, tuple[bytes, list[object]]] = {
    "encoding.jsonl": (
        as_lines(b'{"text": "\xff\xfe", "label": "x"}', b'{"text": "half \xc3", "label": "x"}', b"\x80\x81",
                 line("lone \ud800"), line("pair \U0001f642"), line(label="lone \udfff"), line(id="\ud800"),
                 line("nul \0 inside"), line("\0"), b'{"text": "raw \0 nul", "label": "x"}', line("é" * 3)),
        ["invalid UTF-8", "invalid UTF-8", "invalid UTF-8", "invalid UTF-8", ("pair \U0001f642", "x"),
         "invalid UTF-8", "invalid UTF-8", ("nul \0 inside", "x"), ("\0", "x"), "invalid JSON", ("é" * 3, "x")],
    ),
    "values.jsonl": (
        as_lines(line(5), line(None), line(["a", 1]), line({"a": 1}), line(True), line(math.nan), line("\u3000 \u2003"),
                 line(label=10**400), line(label=7), line(label=-1.5), line(label=True), line(label=math.nan),
                 line(label=math.inf), line(label=None), line(label=["x"]), line(label={"x": 1}), line(label="  "),
                 line(label="x" * 1001), line(label="x" * 1_000_000), line(label=10**1200),
                 b'{"text": "x", "label": 1' + b"0" * 5000 + b"}"),
        ["text is not a string", "no text", *["text is not a string"] * 4, "empty text",
         ("some text", str(10**400)), ("some text", "7"), ("some text", "-1.5"), ("some text", "True"), "no label",
         ("some text", "inf"), "no label", ("some text", "x"), "label is not a string or number", "no label",
         *["label too long"] * 3, "invalid JSON"],
    ),
    "shapes.jsonl": (
        as_lines(b"[]", b"null", b"7", b'"x"', b"{}", b'{"label": "x"}', b'{"text": "x"}', b"", b"   ", b"{", b"}",
                 b'{"text": "a", "label": "x"} {}', b'{"text": "a", "text": "b", "label": "x"}', b"[" * 100_000,
                 b'{"text": "a", "label": ' + b"[" * 900 + b"]" * 900 + b"}", b'{"a":' * 100_000,
                 line(deep={"a": {"b": [{"c": None}]}}), MARK + line(), b"NaN", b"\r", b"'text'"),
        ["not an object"] * 4 + ["no text"] * 2 + ["no label"] + ["empty line"] * 2 + ["invalid JSON"] * 3
        + [("b", "x"), "invalid JSON", "label is not a string or number", "invalid JSON", ("some text", "x"),
           "invalid JSON", "not an object", "empty line", "invalid JSON"],
    ),
    "ids.jsonl": (
        as_lines(*[line(id="same")] * 3, line(id=""), line(id=None), line(id=["x"]), line(id=10**300)),
        [("some text", "x")] * 7,
    ),
    "labels.jsonl": (
        as_lines(*(line(label=label) for label in LABELS)),
        [("some text", label) if label.strip() else "no label" for label in LABELS],
    ),
    "marked.jsonl": (MARK + as_lines(line(), line()), [("some text", "x")] * 2),
    "unended.jsonl": (line() + b"\n" + line()[:-1], [("some text", "x"), "invalid JSON"]),
    "newlines.jsonl": (b"\n\r\n\n", ["empty line"] * 3),
    "newlines.txt": (b"\n\r\n\n", ["empty text"] * 3),
    "long.txt": (b"word " * LONG + b"\nshort", [("word " * LONG, "long"), ("short", "long")]),
    "controls.txt": (b"\x00\x01\x02\n\x1b[31mred\n\x7f\n\x0b\x0c\n\xe2\x80\xa8\na\rb\n",
                     [("\x00\x01\x02", "controls"), ("\x1b[31mred", "controls"), ("\x7f", "controls"), "empty text",
                      "empty text", ("a\rb", "controls")]),
    "quoted.csv": (
        b'text,label\r\n"two\nlines, ""quoted""",x\r\n"a\r\n\r\nb",x\nx\nx,y,z\n\n\xff,x\n"",x\na,\n'
        b'"' + b"y" * 200_000 + b'",x\n\x00,x\n"never closed,x\nx,x\n',
        [('two\nlines, "quoted"', "x"), ("a\r\n\r\nb", "x"), "wrong number of columns", "wrong number of columns",
         "empty line", "invalid UTF-8", "empty text", "no label", ("y" * 200_000, "x"), ("\0", "x"), "invalid CSV"],
    ),
    "rows.tsv": (
        b'text\tlabel\n"not quoted\tx\na\tb\tc\n\ta\n\xe2\x82\tx\n\n',
        [('"not quoted', "x"), "wrong number of columns", "empty text", "invalid UTF-8", "empty line"],
    ),
}  # fmt: skip
EMPTY = {"nothing.jsonl": b"", "mark.jsonl": MARK, "mark.txt": MARK, "nothing.csv": b"", "header.csv": b"text,label\n",
         "header.tsv": MARK + b"text\tlabel"}  # fmt: skip


def write_corpus(folder: Path) -> dict[str, list[object]]:
    """All files, and what becomes of the rows of each, in reading order."""
    folder.mkdir()
    for name, body in (EMPTY | {name: body for name, (body, _) in CORPUS.items()}).items():
        (folder / name).write_bytes(body)
    expected = {name: [] for name in EMPTY} | {name: rows for name, (_, rows) in CORPUS.items()}
    return dict(sorted((expected | write_parquet(folder)).items()))


def write_parquet(folder: Path) -> dict[str, list[object]]:
    tables = {
        "numbers.parquet": (pa.array([1, None]), pa.array(["x", "x"]), ["text is not a string", "no text"]),
        "nested.parquet": (pa.array([["a"], None]), pa.array(["x", "x"]), ["text is not a string", "no text"]),
        "binary.parquet": (pa.array([b"a", None]), pa.array(["x", "x"]), ["text is not a string", "no text"]),
        "nulls.parquet": (pa.nulls(2), pa.array(["x", "x"]), ["no text"] * 2),
        "labels.parquet": (
            pa.array(["some text"] * 5),
            pa.array([1.0, math.nan, None, math.inf, -0.0]),
            [("some text", "1"), "no label", "no label", ("some text", "inf"), ("some text", "0")],
        ),
        "lists.parquet": (
            pa.array(["a", "b"]),
            pa.array([["x", "w"], None]),
            [("a", "w␟x"), "no label"],
        ),
        "nothing.parquet": (pa.array([], pa.string()), pa.array([], pa.string()), []),
    }
    for name, (text, label, _) in tables.items():
        pq.write_table(pa.table({"text": text, "label": label}), folder / name)
    return {name: rows for name, (*_, rows) in tables.items()}


# -- plan and read -----------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3, HUGE])
def test_each_row_of_the_corpus_is_a_document_or_bad_for_its_reason(tmp_path: Path, every: int) -> None:
    expected = write_corpus(tmp_path / "corpus")
    rows = read(tmp_path / "corpus" / "*", docs_per_shard=every)
    found = Counter(row.source for row in rows)
    assert found == {name: len(rows) for name, rows in expected.items() if rows}
    for name, outcome in expected.items():
        assert brief([row for row in rows if row.source == name]) == outcome, name
    assert {row.reason for row in rows if isinstance(row, BadRow)} <= set(REASONS)


def test_empty_files_alone_are_no_data(tmp_path: Path) -> None:
    for name, body in EMPTY.items():
        (tmp_path / name).write_bytes(body)
    with pytest.raises(ValueError, match="holds no row at all"):
        read(tmp_path / "*")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "txt"])
def test_other_encodings_are_named(tmp_path: Path, kind: str, encoding: str) -> None:
    (tmp_path / f"a.{kind}").write_bytes("\ufefftext,label\nx,y\n".encode(encoding))
    with pytest.raises(ValueError, match=rf"a\.{kind} is UTF-16.*iconv"):
        read(tmp_path / f"a.{kind}")


def test_what_is_no_parquet_is_named(tmp_path: Path) -> None:
    for number, body in enumerate((b"", b"text,label\n", b"PAR1" * 100)):
        (tmp_path / f"{number}.parquet").write_bytes(body)
        with pytest.raises(ValueError, match=rf"{number}\.parquet cannot be read as Parquet"):
            read(tmp_path / f"{number}.parquet")


def test_a_file_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "\udcff.txt").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match="its name is not UTF-8"):
        read(tmp_path / "*")


def test_a_hundred_thousand_labels(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(as_lines(*(line(label=f"label {i}") for i in range(100_000))))
    assert [row.label for row in read(tmp_path / "a.jsonl")] == [f"label {i}" for i in range(100_000)]
    made = plan.make_plan(config(tmp_path / "a.jsonl", per_label=1))
    assert made.documents == 100_000


# -- collected ---------------------------------------------------------------------------------------


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def collected(tmp_path_factory, tiny_folder, tiny_model) -> tuple[Path, RunDirectory, dict[str, list[object]]]:
    """The whole corpus, collected deep inside a folder that nothing may leave."""
    root = tmp_path_factory.mktemp("fuzz")
    expected = write_corpus(root / "corpus")
    data = DataConfig(data=(str(root / "corpus" / "*"),), docs_per_shard=16)
    settings = run_config(data, ModelConfig(model=str(tiny_folder)), max_length=32)
    return root, collect_here(root / "a" / "b" / "c" / "run", settings, loaded=tiny_model), expected


def test_what_can_be_collected_is_and_labels_come_back_exactly(collected) -> None:
    _, run, expected = collected
    documents = content(run)["documents"]
    got = Counter(zip(documents["source"].to_pylist(), documents["label"].to_pylist(), strict=True))
    assert got == Counter((name, row[1]) for name, rows in expected.items() for row in rows if isinstance(row, tuple))
    assert {label for label in LABELS if label.strip()} <= set(documents["label"].to_pylist())
    assert Counter(documents["doc_id"].to_pylist())["same"] == 3
    characters = dict(zip(documents["doc_id"].to_pylist(), documents["characters"].to_pylist(), strict=True))
    assert characters["long.txt#0"] == 5 * LONG


def test_bad_rows_are_counted_and_named_by_reason_and_place(collected) -> None:
    _, run, expected = collected
    bad = {(name, place, row) for name, rows in expected.items() for place, row in enumerate(rows)
           if isinstance(row, str)}  # fmt: skip
    counted = Counter()
    named = []
    for commit in run.commits():
        counted.update({reason: skipped.count for reason, skipped in commit.skipped.items()})
        if "rejects" in commit.files:
            named += pq.read_table(run.store.location(commit.files["rejects"].path)).to_pylist()
    assert counted == Counter(reason for *_, reason in bad)
    assert len(named) == len(bad)
    assert {(row["source"], row["row"], row["reason"]) for row in named} == bad


def test_labels_and_ids_make_no_file_outside_of_the_run(collected) -> None:
    root, run, expected = collected
    inside = files_below(root / "a" / "b" / "c" / "run")
    assert files_below(root) - inside == {root / "corpus" / name for name in expected}
    folders = {path.parent.name for path in inside}
    assert folders == {"run", "data", "commits", "rejects"}
    assert len(list(run.commits())) > 5


def test_many_labels_are_collected(tmp_path, tiny_folder, tiny_model) -> None:
    """More in a shard than 15 bits can number, and more in the run than 16."""
    labels = [f"label {i}" for i in range(67_000)]
    (tmp_path / "a.jsonl").write_bytes(as_lines(*(line("a", label) for label in labels)))
    data = DataConfig(data=(str(tmp_path / "a.jsonl"),), docs_per_shard=33_500)
    run = collect_here(tmp_path / "run", run_config(data, ModelConfig(model=str(tiny_folder))), loaded=tiny_model)
    assert content(run)["documents"]["label"].to_pylist() == labels
