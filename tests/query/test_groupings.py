"""Labels may be groups of documents or tokens: every query then says what it would say of a run with these labels."""

from __future__ import annotations

import dataclasses
import itertools
import json
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from collector.models import loading
from collector.models.loading import DEMO_MODEL
from collector.query.catalog import query_folder, read_header
from collector.query.document_counts import document_counts
from collector.query.groupings import find_grouping, read_views, reads_of
from collector.query.rollup import making
from collector.query.warehouse import list_queries, open_run
from collector.store.run_directory import RunDirectory
from collector.store.tables import Layer
from tests.helpers.command_line import exit_status
from tests.helpers.query_runs import assert_same, keyed, opened_once
from tests.helpers.reference import frequency
from tests.helpers.reference.base import groups
from tests.helpers.synthetic import Shard, random_shard, write_run

VIEWS = read_views(query_folder() / "views")
GROUPINGS = sorted(path.stem for path in (query_folder() / "groupings").glob("*.sql"))
QUERIES = [query.name for query in list_queries()]
VIEWS_OF_DOCUMENTS = {"label_outputs", "document_outputs", "document_effects"}
OF_DOCUMENTS = {query.name for query in list_queries() if {"neighbours", *VIEWS_OF_DOCUMENTS} & {*query.reads}}
"""Those that refuse groups of tokens."""
LAYERS = [
    Layer(stack="encoder", layer=1, n_experts=4, top_k=1, has_capacity=True),
    Layer(layer=1, n_experts=6, top_k=2),
    Layer(layer=3, n_experts=5, top_k=3),
]
ENTRIES = [
    ("<|bos|>", True), (" Hello", False), ("123", False), ("!", False), ("<E3><81>", False), ("한국", False),
    (" ", False), ("の本", False), ("ёж", False), ("A1", False), ("€5", False), ("กำ", False),
]  # fmt: skip
BOS, HELLO, DIGITS, MARK, BYTES, KOREAN, SPACE, JAPANESE, RUSSIAN, MIXED, PRICE, THAI = range(len(ENTRIES))
CLASSES = ("special", "Latn", "digit", "punctuation", "other", "Hang", "other", "Hani", "Cyrl", "Latn", "digit", "Thai")
TEXTS = [
    ("en", "web", [BOS, HELLO, DIGITS, MARK, MIXED]),
    ("ko", None, [BOS, KOREAN, HELLO, KOREAN, KOREAN, BYTES, SPACE, MARK]),
    ("xx", "web", [BOS, PRICE]),
    ("ja", "book", [BOS, JAPANESE, RUSSIAN]),
    ("th", "book", [THAI]),
]
HAND = {
    "source": ["web", "(none)", "web", "book", "book"],
    "script": ["Latn", "Hang", "Zyyy", "Cyrl", "Thai"],
    "length": ["000004-000007", "000008-000015", "000002-000003", "000002-000003", "000001"],
}
"""Of two letters each in Cyrl, Hani 1 and Hira 1, the document of ja has most in Cyrl."""


def hand_shard() -> Shard:
    """The documents of `TEXTS`, routed at random; the first token of each is special."""
    documents = [(label, len(ids)) for label, _, ids in TEXTS]
    shard = random_shard(np.random.default_rng(2), LAYERS, documents, special=0)
    ids = np.array([i for *_, ids in TEXTS for i in ids])
    sources = [source for _, source, _ in TEXTS]
    return dataclasses.replace(shard, token_ids=ids, is_special=ids == BOS, sources=sources,
                               spans=[(None, "user", "assistant")[place % 3] for place in range(len(ids))])  # fmt: skip


def bucket(number: int) -> str:
    """The name of the power-of-two bucket: 0, 1, 2-3, 4-7 and so on."""
    least = 1 << (number.bit_length() - 1) if number else 0
    return f"{least:06d}" if least < 2 else f"{least:06d}-{2 * least - 1:06d}"


def token_groups(shard: Shard, by: str) -> list[str]:
    """[T] the group of each token."""
    if by == "span":
        return ["(none)" if span is None else span for span in shard.spans]
    if by == "token_class":
        return [CLASSES[i] for i in shard.ids]
    return [bucket(position) for _, length in shard.documents for position in range(length)]


def relabelled(shard: Shard, labels: list[str]) -> Shard:
    documents = [(label, length) for label, (_, length) in zip(labels, shard.documents, strict=True)]
    return dataclasses.replace(shard, documents=documents)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("groupings") / "run", LAYERS, [hand_shard()], vocabulary=ENTRIES)


@pytest.fixture(scope="module")
def with_rollup(tmp_path_factory) -> Path:
    path = write_run(tmp_path_factory.mktemp("groupings") / "rollup", LAYERS, [hand_shard()], vocabulary=ENTRIES)
    making.make(RunDirectory(path))
    return path


# ---- which groups ----


@pytest.mark.parametrize("by", HAND)
def test_groups_of_documents_worked_out_by_hand(folder, by) -> None:
    run = open_run(folder, by=by)
    assert run.by == by
    assert [row[0] for row in run.sql("select label from documents order by doc").fetchall()] == HAND[by]
    expected = Counter(HAND[by])
    assert dict(run.sql("select label, documents from labels order by label").fetchall()) == expected
    joined = "select distinct doc, r.label from routing as r join tokens using (shard, tok) order by doc"
    assert [row[1] for row in run.sql(joined).fetchall()] == HAND[by]


@pytest.mark.parametrize("by", ["position", "span", "token_class"])
def test_groups_of_tokens_worked_out_by_hand(folder, by) -> None:
    run, shard = open_run(folder, by=by), hand_shard()
    expected = token_groups(shard, by)
    for stack, layer in (("encoder", 1), ("decoder", 3)):
        rows = f"select label from routing where stack = '{stack}' and layer = {layer} order by tok"
        assert [row[0] for row in run.sql(rows).fetchall()] == expected
    labelled = run.sql("select label from labelled_tokens where stack = 'encoder' order by tok").fetchall()
    assert [row[0] for row in labelled] == expected
    assert dict(run.sql("select label, tokens from labels").fetchall()) == Counter(expected)
    documents = {label: set() for label in expected}
    for doc, label in zip(np.repeat(np.arange(len(TEXTS)), shard.lengths), expected, strict=True):
        documents[label].add(doc)
    found = dict(run.sql("select label, documents from labels").fetchall())
    assert found == {label: len(docs) for label, docs in documents.items()}


def test_names_of_buckets_sort_as_their_numbers() -> None:
    names = [bucket(2**i) for i in range(20)]
    assert names == sorted(names)


def test_every_letter_of_a_real_vocabulary_is_of_the_script_that_unicode_names(tmp_path) -> None:
    entries = loading.readable_vocabulary(AutoTokenizer.from_pretrained(DEMO_MODEL))
    run = open_run(write_run(tmp_path / "run", LAYERS, [], complete=False, vocabulary=[e[1:] for e in entries]))
    first_word = {
        "LATIN": "Latn", "CYRILLIC": "Cyrl", "HANGUL": "Hang", "CJK": "Hani", "HIRAGANA": "Hira", "KATAKANA": "Kana",
        "GREEK": "Grek", "ARABIC": "Arab", "HEBREW": "Hebr", "DEVANAGARI": "Deva", "BENGALI": "Beng", "THAI": "Thai",
        "LAO": "Laoo", "GEORGIAN": "Geor", "ARMENIAN": "Armn", "ETHIOPIC": "Ethi", "TAMIL": "Taml", "TELUGU": "Telu",
        "KATAKANA-HIRAGANA": "Zyyy",
        "KANNADA": "Knda", "MALAYALAM": "Mlym", "GUJARATI": "Gujr", "GURMUKHI": "Guru", "ORIYA": "Orya",
    }  # fmt: skip
    wrong, seen = [], set()
    rows = run.sql(
        "select token, list(class) from vocab join vocab_characters using (token_id) group by token_id, token"
    )
    for token, classes in rows.fetchall():
        if token == "\u0640":  # named Arabic, but Syriac and others have it too
            continue
        letters = {
            first_word.get(unicodedata.name(c, "").split(" ")[0]) for c in token if unicodedata.category(c)[0] == "L"
        }
        numbers = {"digit" for c in token if unicodedata.category(c)[0] == "N"}
        signs = {"punctuation" for c in token if unicodedata.category(c)[0] in "PS"}
        if None not in letters and not any(unicodedata.category(c)[0] == "M" for c in token):
            seen |= letters
            wrong += [(token, classes)] if set(classes) != letters | numbers | signs else []
    assert seen == set(first_word.values())
    assert wrong == []


# ---- the queries over groups ----


@pytest.mark.parametrize("by", HAND)
@pytest.mark.parametrize("rollup", [False, True])
def test_queries_over_groups_of_documents_are_those_over_such_labels(with_rollup, tmp_path, by, rollup) -> None:
    grouped = open_run(with_rollup, by=by, rollup=rollup)
    shard = relabelled(hand_shard(), HAND[by])
    labelled = open_run(write_run(tmp_path / "run", LAYERS, [shard], vocabulary=ENTRIES))
    for name in QUERIES:
        ours, theirs = grouped.query(name).fetchall(), labelled.query(name).fetchall()
        assert len(ours) == len(theirs), name
        for got, wanted in zip(ours, theirs, strict=True):
            for x, y in zip(got, wanted, strict=True):
                assert x == (pytest.approx(y, rel=1e-5, abs=1e-6) if isinstance(y, float) else y), name


@pytest.mark.parametrize("by", ["position", "span", "token_class"])
def test_queries_over_groups_of_tokens_count_these_tokens(with_rollup, by) -> None:
    run, shard = open_run(with_rollup, by=by), hand_shard()
    single = dataclasses.replace(shard, documents=[(group, 1) for group in token_groups(shard, by)])
    for include_special in (False, True):
        found = list(groups(LAYERS, [single], include_special=include_special))
        special = {"include_special": include_special}
        assert_same(keyed(run, "domain_specialization", 5, **special), frequency.domain_specialization(found))
        assert_same(keyed(run, "selection_frequency", 5, **special), frequency.selection_frequency(found))
        assert_same(keyed(run, "router_entropy", 4, **special), frequency.router_entropy(found))
        quantiles = frequency.router_entropy_quantiles(found)
        assert_same(keyed(run, "router_entropy_quantiles", 4, **special), quantiles)
        assert_same(keyed(run, "dropped_tokens", 4, **special), frequency.dropped_tokens(found))
    for name in {*QUERIES} - OF_DOCUMENTS:
        run.query(name).fetchall()


def test_specialization_by_position_is_the_position_profile_of_one_label(tmp_path) -> None:
    shard = random_shard(np.random.default_rng(4), LAYERS, [("en", 40), ("en", 9)])
    folder = write_run(tmp_path / "run", LAYERS, [shard])
    profile = open_run(folder).query("position_profile").project("stack, layer, first_position, expert, value")
    grouped = open_run(folder, by="position").query("domain_specialization")
    rows = [(stack, layer, int(label[:6]), expert, value) for stack, layer, label, expert, value in
            grouped.project("stack, layer, label, expert, value").fetchall()]  # fmt: skip
    assert sorted(rows) == sorted(profile.fetchall())


def test_a_document_has_a_row_of_counts_for_each_group_of_its_tokens(folder) -> None:
    shard = hand_shard()
    expected = token_groups(shard, "token_class")
    docs = np.repeat(np.arange(len(TEXTS)), shard.lengths).tolist()
    for counts in document_counts(open_run(folder, by="token_class"), include_special=True):
        rows = zip(counts.doc_D.tolist(), [counts.labels[i] for i in counts.label_D], strict=True)
        assert dict(zip(rows, counts.tokens_D.tolist(), strict=True)) == Counter(zip(docs, expected, strict=True))
        assert counts.picks_DE.sum(axis=1).tolist() == (counts.top_k * counts.tokens_D).tolist()


def test_fertility_of_groups_of_tokens_is_unknown(folder) -> None:
    rows = open_run(folder, by="position").query("fertility").project("metric, value").fetchall()
    assert {value for metric, value in rows if metric == "tokens_per_character"} == {None}


def test_groups_are_chosen_by_name_and_unknown_ones_refused(folder) -> None:
    run = open_run(folder, by="source")
    assert {row[3] for row in run.query("top_experts", labels=["book"]).fetchall()} == {"book"}
    with pytest.raises(ValueError, match=r"no document of this run has the source 'blog'; it has \(none\), book, web"):
        run.query("top_experts", labels=["blog"])


@pytest.mark.parametrize("by", GROUPINGS)
def test_a_condition_on_the_router_reaches_the_files(folder, with_rollup, by) -> None:
    relations = ("routing", "decisions", "assignments", "label_statistics")
    runs = [open_run(path, by=by) for path in (folder, with_rollup)]
    for run, relation in itertools.product(runs, relations):
        plan = run.connection.sql(f"explain select * from {relation} where layer = 3").fetchall()[0][1]
        assert "Filters: layer = 3" in plan, relation


@pytest.mark.parametrize("by", GROUPINGS)
def test_a_grouped_run_has_the_same_relations_and_columns(folder, by) -> None:
    plain, grouped = opened_once(folder), open_run(folder, by=by)
    names = {row[0] for row in plain.sql("select view_name from duckdb_views() where not internal").fetchall()}
    without = VIEWS_OF_DOCUMENTS if find_grouping(by).of == "token" else set()
    assert without < names
    for name in names - without:
        described = f"select column_name, column_type from (describe {name})"
        assert grouped.sql(described).fetchall() == plain.sql(described).fetchall(), name


@pytest.mark.parametrize("by", GROUPINGS)
def test_a_run_without_a_commit_has_no_groups(tmp_path, by) -> None:
    run = open_run(write_run(tmp_path / "run", LAYERS, [], complete=False), by=by)
    assert run.sql("from labels").fetchall() == []
    assert run.query("load_balance").fetchall() == []


# ---- what is refused ----


def test_an_unknown_grouping_names_the_choices(folder) -> None:
    with pytest.raises(ValueError, match="no grouping 'sauce'; runs are grouped by label, length, phase, position, "):
        open_run(folder, by="sauce")


@pytest.mark.parametrize("by", ["script", "token_class"])
def test_a_run_that_dropped_its_token_ids_says_so(tmp_path, by) -> None:
    folder = write_run(tmp_path / "run", LAYERS, [hand_shard()], vocabulary=None)
    with pytest.raises(ValueError, match=f"--by {by} needs vocab, which this run does not have.*--token-ids drop"):
        open_run(folder, by=by)
    assert open_run(folder, by="position").query("top_experts").fetchall()


def test_a_run_of_an_earlier_version_has_no_spans(tmp_path) -> None:
    folder = write_run(tmp_path / "run", LAYERS, [hand_shard()], vocabulary=ENTRIES)
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(info | {"format": 1}))
    with pytest.raises(ValueError, match=r"--by span needs the column span of tokens.*collect it again"):
        open_run(folder, by="span")
    assert open_run(folder).query("top_experts").fetchall()


def test_headers_tell_everything() -> None:
    assert GROUPINGS == ["length", "phase", "position", "role", "script", "source", "span", "token_class"]
    for name in GROUPINGS:
        grouping = find_grouping(name)
        header = read_header(grouping.sql)
        assert header["question"].endswith("?")
        assert header["formula"]
        assert header["groups"] in ("documents", "tokens")
        assert grouping.of in ("document", "token")
        reads = reads_of(grouping.sql)
        reads += tuple(each for view in reads if view in VIEWS for each in reads_of(VIEWS[view]))
        assert {needed.partition(".")[0] for needed in grouping.needs} <= {*reads}


# ---- by command ----


def test_every_reading_command_takes_a_grouping(folder, capsys) -> None:
    run = str(folder)
    assert exit_status("query", run, "effective_experts", "--by", "source", "--layer", "3", "--format", "json") == 0
    assert {row["label"] for row in json.loads(capsys.readouterr().out)} == {"web", "(none)", "book"}
    assert exit_status("query", run, "effective_experts", "--by=length", "--labels", "000001", "--format", "json") == 0
    assert {row["label"] for row in json.loads(capsys.readouterr().out)} == {"000001"}
    assert exit_status("sql", run, "select distinct label from routing", "--by", "script", "--format", "csv") == 0
    assert sorted(capsys.readouterr().out.split()) == ['"Cyrl"', '"Hang"', '"Latn"', '"Thai"', '"Zyyy"', '"label"']
    assert exit_status("show", run, "--by", "token_class") == 0
    assert "punctuation" in capsys.readouterr().out
    assert exit_status("query", run, "top_experts", "--by", "sauce") == 2
    assert "no grouping 'sauce'" in capsys.readouterr().err
