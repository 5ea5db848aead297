"""The layouts of public data sets and of people's own: what becomes a document's text, label and id.

The flags of each layout are those that the page *Data and labels* gives.
"""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from collector.data import plan, sources
from collector.data.sources import BadRow
from tests.helpers.documents import brief, config, pack, read
from tests.helpers.paths import ROOT

if TYPE_CHECKING:
    from pathlib import Path


def json_lines(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def parquet(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def flags(layout: str) -> dict[str, str]:
    """The settings in the page's row of a layout."""
    rows = [line.split(" | ") for line in (ROOT / "docs" / "data.md").read_text(encoding="utf-8").splitlines()]
    (told,) = [row[-1].rstrip(" |").strip("`") for row in rows if row[0] == f"| {layout}"]
    words = shlex.split(told)
    return {
        flag.removeprefix("--").replace("-", "_"): value for flag, value in zip(words[::2], words[1::2], strict=True)
    }


# -- public data sets --------------------------------------------------------------------------------


def test_flores_plus_labels_by_language_and_script(tmp_path: Path) -> None:
    parquet(
        tmp_path / "dev" / "kor_Hang.parquet",
        {"id": 0, "iso_639_3": "kor", "iso_15924": "Hang", "text": "안녕"},
        {"id": 0, "iso_639_3": "nob", "iso_15924": "Latn", "text": "hei"},
        {"id": 0, "iso_639_3": None, "iso_15924": "Latn", "text": "?"},
    )
    found = read(tmp_path / "dev" / "*", **flags("FLORES+"))
    assert brief(found) == [("안녕", "kor_Hang"), ("hei", "nob_Latn"), "no label"]
    assert [row.parallel_id for row in found[:2]] == ["0", "0"]


def test_fineweb_2_labels_by_the_folder_above_the_split(tmp_path: Path) -> None:
    for language in ("kor_Hang", "deu_Latn"):
        parquet(tmp_path / "data" / language / "train" / "000_00000.parquet", {"text": f"in {language}", "id": "<urn>"})
    found = read(tmp_path / "data" / "**" / "*.parquet", **flags("FineWeb-2"))
    assert brief(found) == [("in deu_Latn", "deu_Latn"), ("in kor_Hang", "kor_Hang")]


def test_culturax_labels_by_the_folder(tmp_path: Path) -> None:
    for language in ("af", "ko"):
        parquet(tmp_path / language / f"{language}_part_00000.parquet", {"text": f"in {language}", "source": "mC4"})
    assert brief(read(tmp_path / "*" / "*.parquet", **flags("CulturaX"))) == [("in af", "af"), ("in ko", "ko")]


def test_mc4_labels_by_a_part_of_the_file_name(tmp_path: Path) -> None:
    for name in ("c4-af.tfrecord-00000-of-00064", "c4-zh-Latn.tfrecord-00000-of-00001", "c4-af-validation.tfrecord-0"):
        pack(json_lines(tmp_path / f"{name}.json", {"text": f"in {name}", "url": "https://…"}), "gz")
    found = read(tmp_path / "*.json.gz", **flags("mC4"))
    assert [row.label for row in found] == ["af", "af", "zh-Latn"]


def test_oscar_labels_by_a_nested_column(tmp_path: Path) -> None:
    row = {"content": "teks", "metadata": {"identification": {"label": "af", "prob": 0.9}, "harmful_pp": None}}
    pack(json_lines(tmp_path / "af_meta" / "af_meta.jsonl", row), "zst")
    columns = flags("OSCAR")
    assert brief(read(tmp_path / "*" / "*.jsonl.zst", **columns)) == [("teks", "af")]
    parquet(tmp_path / "same.parquet", row)
    assert brief(read(tmp_path / "same.parquet", **columns)) == [("teks", "af")]


def test_wide_flores_gives_a_document_per_language_and_sentence(tmp_path: Path) -> None:
    rows = [{"id": 7, "domain": "news", "sentence_kor_Hang": "하나", "sentence_eng_Latn": "one"},
            {"id": 8, "domain": "wiki", "sentence_kor_Hang": "둘", "sentence_eng_Latn": None}]  # fmt: skip
    for path in (parquet(tmp_path / "all.parquet", *rows), json_lines(tmp_path / "all.jsonl", *rows)):
        found = read(path, **flags("Wide files"))
        assert brief(found) == [("하나", "kor_Hang"), ("둘", "kor_Hang"), ("one", "eng_Latn"), "no text"]
        assert [row.id for row in found[:3]] == ["7:kor_Hang", "8:kor_Hang", "7:eng_Latn"]
        assert [row.parallel_id for row in found[:3]] == ["7", "8", "7"]


def test_translations_give_a_document_per_language(tmp_path: Path) -> None:
    rows = [{"translation": {"de": "eins", "en": "one"}}, {"translation": {"de": "zwei", "en": "two"}}]
    for path in (parquet(tmp_path / "a.parquet", *rows), json_lines(tmp_path / "a.jsonl", *rows)):
        found = read(path, **flags("Translations"))
        assert brief(found) == [("eins", "de"), ("zwei", "de"), ("one", "en"), ("two", "en")]
        assert [row.parallel_id for row in found] == [f"{path.name}#{row}" for row in (0, 1, 0, 1)]
        assert brief(read(path, text_column="translation.en", label_column="@file")) == [("one", "a"), ("two", "a")]


def test_a_wide_csv_file_by_a_list_of_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("nr,en,ko,de\n1,one,하나,eins\n", encoding="utf-8")
    found = read(tmp_path / "a.csv", **flags("Columns by name"))
    assert [(row.text, row.label, row.id) for row in found] == [("one", "en", "1:en"), ("하나", "ko", "1:ko")]
    with pytest.raises(ValueError, match=r"no column 'fr'; it has nr, en, ko, de: set --text-column"):
        read(tmp_path / "a.csv", text_column="en,fr")


def test_the_language_of_a_wide_file_may_be_a_part_of_the_label(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"domain": "news", "text_en": "one", "text_ko": "하나"})
    found = read(path, text_column="text_*", label_column="{domain}/{@column}")
    assert brief(found) == [("one", "news/en"), ("하나", "news/ko")]


def test_a_column_with_a_star_or_a_comma_in_its_name_is_that_column(tmp_path: Path) -> None:
    path = json_lines(tmp_path / "a.jsonl", {"text, raw": "one", "text*": "two", "label": "x"})
    assert brief(read(path, text_column="text, raw")) == [("one", "x")]
    assert brief(read(path, text_column="text*")) == [("two", "x")]


def test_hive_folders_are_columns(tmp_path: Path) -> None:
    for language in ("en", "pt%2DBR", "__HIVE_DEFAULT_PARTITION__"):
        parquet(tmp_path / f"lang={language}" / "year=2024" / "part-0.parquet", {"text": f"in {language}"})
    (tmp_path / "lang=ko").mkdir()
    (tmp_path / "lang=ko" / "a.txt").write_text("plain\n", encoding="utf-8")
    found = read(tmp_path / "lang=[ekp]*" / "**" / "*.*", **flags("Hive folders"))
    assert brief(found) == [("in en", "en"), ("plain", "ko"), ("in pt%2DBR", "pt-BR")]
    found = read(tmp_path / "lang=en" / "**" / "*.*", label_column="{lang}/{year}")
    assert [row.label for row in found] == ["en/2024"]
    with pytest.raises(ValueError, match="has no column 'lang'; it has text"):
        read(tmp_path / "lang=__*" / "**" / "*.parquet", label_column="lang")


def test_a_column_of_the_file_wins_over_the_folder(tmp_path: Path) -> None:
    path = json_lines(tmp_path / "lang=en" / "a.jsonl", {"text": "a", "lang": "ko"}, {"text": "b"})
    assert brief(read(path, label_column="lang")) == [("a", "ko"), ("b", "en")]


# -- several labels ----------------------------------------------------------------------------------


def test_a_list_gives_a_document_several_labels(tmp_path: Path) -> None:
    rows = [{"text": "a", "lang": ["kor_Hang", "eng_Latn"]}, {"text": "b", "lang": ["eng_Latn"]},
            {"text": "c", "lang": ["x", "x", None]}, {"text": "d", "lang": []},
            {"text": "e", "lang": [["x"]]}]  # fmt: skip
    expected = [("a", "eng_Latn␟kor_Hang"), ("b", "eng_Latn"), ("c", "x")]
    found = read(json_lines(tmp_path / "a.jsonl", *rows), label_column="lang")
    assert brief(found) == [*expected, "no label", "label is not a string or number"]
    assert found[0].labels == ["eng_Latn", "kor_Hang"]
    found = read(parquet(tmp_path / "a.parquet", *rows[:4]), label_column="lang")
    assert brief(found) == [*expected, "no label"]


def test_a_label_with_the_separator_is_a_bad_row(tmp_path: Path) -> None:
    path = json_lines(tmp_path / "a.jsonl", {"text": "a", "label": "x␟y"}, {"text": "b", "label": "x"})
    assert brief(read(path)) == ["label contains ␟", ("b", "x")]


def test_per_label_counts_a_document_for_each_of_its_labels(tmp_path: Path) -> None:
    rows = [{"text": str(i), "label": label} for i, label in enumerate((["x", "y"], ["x"], ["x"], ["y"], ["y", "z"]))]
    found = read(json_lines(tmp_path / "a.jsonl", *rows), per_label=2)
    assert [row.text for row in found] == ["0", "1", "3", "4"]


# -- classes and numbers -----------------------------------------------------------------------------


@pytest.fixture
def classes() -> datasets.Dataset:
    features = datasets.Features({
        "text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"]),
        "inner": {"lang": datasets.ClassLabel(names=["en", "ko"])},
        "several": datasets.List(datasets.ClassLabel(names=["a", "b", "c"])),
    })  # fmt: skip
    rows = {"text": ["x", "y"], "label": [1, -1], "inner": [{"lang": 0}, {"lang": 1}], "several": [[2, 0], [1]]}
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize("written", ["parquet", "saved", "hub"])
def test_classes_have_their_names(tmp_path: Path, classes: datasets.Dataset, written: str) -> None:
    spec = str(tmp_path / "data")
    if written == "saved":
        classes.save_to_disk(spec)
    else:
        (tmp_path / "data").mkdir()
        classes.to_parquet(f"{spec}/train.parquet")
        spec = f"hf:{spec}" if written == "hub" else f"{spec}/train.parquet"
    assert brief(read(spec)) == [("x", "pos"), "no label"]
    assert brief(read(spec, label_column="inner.lang")) == [("x", "en"), ("y", "ko")]
    assert brief(read(spec, label_column="several")) == [("x", "a␟c"), ("y", "b")]
    assert brief(read(spec, label_column="{inner.lang}-{@file}"))[0] == (
        "x",
        "en-train" if written != "saved" else "en-data",
    )


def test_whole_numbers_stay_whole_in_a_column_with_gaps(tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": ["a", "b", "c"], "label": [1, None, 3], "id": [10, 11, None]})
    frame.to_parquet(tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet")
    assert brief(found) == [("a", "1"), "no label", ("c", "3")]
    assert [found[0].id, found[2].id] == ["10", "a.parquet#2"]


# -- what is refused while planning ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"label_column": "lang"},
            r"no column 'lang'; it has text, label, meta, meta\.x: set --label-column, or @file",
        ),
        ({"text_column": "txt"}, r"no column 'txt'; it has .*: set --text-column"),
        ({"label_column": "meta.y"}, r"no column 'meta\.y'"),
        ({"label_column": "{label}-{lang}"}, "no column 'lang'"),
        ({"id_column": "nr"}, "no column 'nr'.*: set --id-column"),
        ({"parallel_column": "nr"}, "no column 'nr'.*: set --parallel-column"),
        ({"spans_column": "spans"}, "no column 'spans'.*: set --spans-column"),
        ({"target_column": "goal"}, "no column 'goal'.*: set --target-column"),
        ({"text_column": "text_*"}, r"no column 'text_\*'"),
        ({"label_column": "@folder:40"}, "@folder:40: .* lies in"),
        ({"label_column": "@path:(z+)/q"}, "its first group"),
        ({"label_column": "@path:("}, "no regular expression"),
        ({"label_column": "@name"}, "of a path there are @file, @folder"),
        ({"label_column": "{label"}, "--label-column {label: "),
        ({"label_column": "{}"}, "names no column"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_missing_columns_are_named_while_planning(tmp_path: Path, kind: str, columns: dict, message: str) -> None:
    write = json_lines if kind == "jsonl" else parquet
    path = write(tmp_path / f"a.{kind}", {"text": "a", "label": "x", "meta": {"x": 1}})
    with pytest.raises(ValueError, match=message):
        plan.make_plan(config(path, **columns))


def test_a_column_that_only_some_of_the_first_rows_have_is_enough(tmp_path: Path) -> None:
    path = json_lines(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b", "label": "x"})
    assert brief(read(path)) == ["no label", ("b", "x")]


def test_a_warning_where_one_label_spans_folders_that_differ(tmp_path: Path) -> None:
    for folder in ("en", "ko"):
        json_lines(tmp_path / folder / "train.jsonl", {"text": "a"})
        json_lines(tmp_path / folder / "more" / f"{folder}.jsonl", {"text": "a"})
    for label_column, warned in (("@file", ["train"]), ("@folder", ["more"]), ("@path:/(en|ko)/", [])):
        data = config(tmp_path / "**" / "*.jsonl", label_column=label_column).data
        warnings = plan.label_warnings(sources.resolve(data), data)
        assert [warning.split("'")[1] for warning in warnings] == warned
        assert all(str(tmp_path / "en") in warning and "@folder" in warning for warning in warnings)


# -- conversations and spans -------------------------------------------------------------------------


def test_turns_in_the_usual_spellings(tmp_path: Path) -> None:
    turns = [("user", "Hi"), ("assistant", "Hello")]
    for messages in (
        [{"role": role, "content": content} for role, content in turns],
        [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
        [{"role": role, "content": [{"type": "text", "text": content}]} for role, content in turns],
    ):
        path = json_lines(tmp_path / "a.jsonl", {"messages": messages, "lang": "x"})
        (found,) = read(path, **flags("Conversations"))
        assert found.messages == tuple(turns)
    data = config(path, **flags("Conversations")).data
    assert plan.has_conversations(sources.resolve(data), data)


@pytest.mark.parametrize(
    "turn", [{"role": "user"}, {"content": "x"}, {"role": "user", "content": [{"type": "image"}]}, {}]
)
def test_turns_without_role_or_content_are_bad_rows(tmp_path: Path, turn: dict) -> None:
    good = {"role": "user", "content": "x"}
    path = json_lines(tmp_path / "a.jsonl", {"text": [good, turn], "label": "x"}, {"text": [], "label": "x"})
    assert brief(read(path)) == ["messages without role and content", "text is not a string"]


def test_spans_of_a_text(tmp_path: Path) -> None:
    good = {"start": 0, "end": 2, "label": "code"}
    bad = {
        "spans are not a list of start, end and label": [
            "x", 7, ["x"], [{"start": 0, "end": 2}], [{"start": "0", "end": 2, "label": "x"}],
            [{"start": 0, "end": 2, "label": ""}], [good, None], [{"start": True, "end": 2, "label": "x"}],
        ],
        "span outside the text": [
            [{"start": 0, "end": 4, "label": "x"}], [{"start": 2, "end": 2, "label": "x"}],
            [{"start": -1, "end": 2, "label": "x"}],
        ],
    }  # fmt: skip
    rows = [[good], None, *(value for values in bad.values() for value in values)]
    path = json_lines(tmp_path / "a.jsonl", *({"text": "abc", "label": "x", "spans": value} for value in rows))
    found = read(path, **flags("Labelled parts"))
    assert [row.spans for row in found[:2]] == [((0, 2, "code"),), ()]
    assert [row.reason for row in found[2:] if isinstance(row, BadRow)] == [
        r for r, values in bad.items() for _ in values
    ]
