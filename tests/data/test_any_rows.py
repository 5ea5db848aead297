"""Arbitrary rows in each text format, against what each row was made to be, however the file is cut."""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.helpers.documents import BAD_JSON, HUGE, brief, expected_of, read

if TYPE_CHECKING:
    from pathlib import Path

ends = st.sampled_from([b"\n", b"\r\n"])
sizes = st.sampled_from([1, 2, 3, HUGE])
words = st.text(max_size=12)


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
    rows = [(json_line("first", "x", True), b"\n"), *rows]  # a file without any of the columns is refused
    expected = [row[1] for row, _ in rows]
    if not last_ended and rows[-1][0][0] == b"":
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
