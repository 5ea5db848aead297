"""Files that are one JSON value, against json.loads of the whole, however they are cut."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collector.data import plan
from collector.data.formats import json_document
from tests.helpers.documents import ROWS, brief, config, read

if TYPE_CHECKING:
    from pathlib import Path

EXPECTED = [(row["text"], row["label"]) for row in ROWS]
DUMPS = {
    "pretty": lambda rows: json.dumps(rows, indent=2), "compact": lambda rows: json.dumps(rows, separators=(",", ":")),
    "raw": lambda rows: json.dumps(rows, ensure_ascii=False, indent=1).replace("\n", "\r\n"),
    "a row per line": lambda rows: "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n",
    "marked": lambda rows: "\ufeff" + json.dumps(rows, indent=1),
}  # fmt: skip


@pytest.mark.parametrize("every", [1, 3, 1000])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
@pytest.mark.parametrize("dump", DUMPS)
def test_one_array(tmp_path: Path, dump: str, name: str, every: int) -> None:
    content = DUMPS[dump](ROWS).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    found = read(tmp_path / name, docs_per_shard=every)
    assert brief(found) == EXPECTED
    assert [row.id for row in found] == [row["id"] for row in ROWS]


@pytest.mark.parametrize("every", [1, 1000])
@pytest.mark.parametrize("indent", [None, 1])
def test_one_wrapped_array(tmp_path: Path, indent: int | None, every: int) -> None:
    content = {"version": "1.0", "meta": {"tags": ["a"], "n": [1, 2]}, "data": ROWS, "empty": [], "after": None}
    (tmp_path / "a.json").write_text(json.dumps(content, indent=indent), encoding="utf-8")
    assert brief(read(tmp_path / "a.json", docs_per_shard=every)) == EXPECTED


def test_several_arrays_are_refused_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"train": ROWS, "test": ROWS}, indent=1), encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds several arrays of objects, train, test: .*\(jq -c '\.train\[\]'\)"):
        read(tmp_path / "a.json")


def test_a_single_object_is_one_row(tmp_path: Path) -> None:
    for number, indent in enumerate((None, 2)):
        (tmp_path / f"{number}.json").write_text(json.dumps(ROWS[number], indent=indent), encoding="utf-8")
    assert brief(read(tmp_path / "*.json")) == EXPECTED[:2]


def test_columns_of_an_object_are_no_rows(tmp_path: Path) -> None:
    columns = {"text_0": {"0": "a", "1": "b"}, "label": {"0": "x", "1": "y"}}
    (tmp_path / "a.json").write_text(json.dumps(columns, indent=1), encoding="utf-8")
    with pytest.raises(ValueError, match=r"has no column 'text'; it has text_0, text_0\.0, text_0\.1, label"):
        read(tmp_path / "a.json")


def test_json_lines_stay_json_lines_whatever_the_ending(tmp_path: Path) -> None:
    long = {"text": "x" * 10_000, "label": "long", "more": [{"a": 1}]}
    for name in ("a.json", "a.jsonl", "a.ndjson"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in (*ROWS, long)), encoding="utf-8")
        assert brief(read(tmp_path / name)) == [*EXPECTED, (long["text"], "long")]
    (tmp_path / "b.json").write_text(json.dumps(long) + "\n" + json.dumps(long) + "\n", encoding="utf-8")
    assert brief(read(tmp_path / "b.json")) == [(long["text"], "long")] * 2
    (tmp_path / "b.json.gz").write_bytes(gzip.compress((tmp_path / "b.json").read_bytes()))
    assert brief(read(tmp_path / "b.json.gz")) == [(long["text"], "long")] * 2
    (tmp_path / "c.json").write_text(json.dumps({"rows": [long, *ROWS]}), encoding="utf-8")
    assert brief(read(tmp_path / "c.json")) == [(long["text"], "long"), *EXPECTED]


def test_bad_elements_are_bad_rows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(
        b'[{"text": "a", "label": "x"}, 7, null, ["x"], {"text": "\xff", "label": "x"}, {"label": "x"}]'
    )
    assert brief(read(tmp_path / "a.json", docs_per_shard=2)) == [
        ("a", "x"), "not an object", "not an object", "not an object", "invalid UTF-8", "no text",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "content", ['[{"text": "a", "label": "x"}', '[{"text": "a" "label": "x"}]', '[{"text": "a",\n', "[,]"]
)
def test_what_is_no_json_is_refused_with_the_place(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.json is no JSON from byte \d+ on: write an object per line"):
        plan.make_plan(config(tmp_path / "a.json"))


def test_an_empty_array_holds_no_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[ ]", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no row at all"):
        read(tmp_path / "a.json")


def test_columns_are_looked_up_while_planning(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a", "meta": {"lang": "ko"}}], indent=1), encoding="utf-8")
    with pytest.raises(ValueError, match=r"no column 'label'; it has text, meta, meta\.lang"):
        read(tmp_path / "a.json")
    assert brief(read(tmp_path / "a.json", label_column="meta.lang")) == [("a", "ko")]


values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**20) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=6,
)  # fmt: skip
elements = st.fixed_dictionaries(
    {"text": st.text(min_size=1, max_size=8).filter(str.strip), "label": st.just("x"), "v": values}
)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(elements, min_size=1, max_size=6), st.sampled_from([None, 1]), st.booleans(), st.sampled_from([1, 2, 9])
)
def test_any_array_in_blocks_of_any_size(tmp_path_factory, rows, indent, ascii_only, every) -> None:
    path = tmp_path_factory.mktemp("any") / "a.json"
    path.write_bytes(json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_document, "_BLOCK", 3)
        found = read(path, docs_per_shard=every)
    assert brief(found) == [
        (row["text"], "x") for row in json.loads(path.read_bytes().decode("utf-8", "surrogatepass"))
    ]
