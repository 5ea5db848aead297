"""Two runs side by side: the same tokens wherever they lie, and a refusal of everything that differs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import duckdb
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector import open_run, open_runs
from collector.query.comparison import Comparison, list_comparisons
from collector.query.warehouse import list_queries
from collector.store.tables import Layer
from tests.helpers.query_runs import (
    LABELS,
    VOCABULARY,
    assert_same,
    assert_same_rows,
    few_examples,
    geometries,
    opened_once,
)
from tests.helpers.reference import comparison as reference
from tests.helpers.synthetic import VOCABULARY_ENTRIES, Shard, joined, random_shard, write_run

LAYERS = (Layer(layer=0, n_experts=7, top_k=2), Layer(layer=3, n_experts=5, top_k=1))
Texts = list[Shard]
"""Documents, each in a shard of its own."""


def random_texts(rng: np.random.Generator, layers: Sequence[Layer], documents: Sequence[tuple[str, int]]) -> Texts:
    shards = [random_shard(rng, layers, [document], special=0.3, vocabulary=VOCABULARY) for document in documents]
    return [dataclasses.replace(shard, document_ids=[f"text {i}"]) for i, shard in enumerate(shards)]


def routed_again(rng: np.random.Generator, layers: Sequence[Layer], texts: Texts) -> Texts:
    """The same texts through other routers."""
    routing = ("experts", "weights", "statistics", "dropped", "probabilities")
    others = [random_shard(rng, layers, text.documents, vocabulary=VOCABULARY) for text in texts]
    return [
        dataclasses.replace(text, **{name: getattr(other, name) for name in routing})
        for text, other in zip(texts, others, strict=True)
    ]


def shards_of(texts: Texts, size: int) -> list[Shard]:
    """So many documents to a shard."""
    return [joined(texts[first : first + size]) for first in range(0, len(texts), size)]


@contextlib.contextmanager
def opened(layers: Sequence[Layer], ours: Sequence[Shard], theirs: Sequence[Shard]) -> Iterator[Comparison]:
    with tempfile.TemporaryDirectory() as folder:
        yield open_runs(
            write_run(Path(folder, "one"), layers, ours), write_run(Path(folder, "another"), layers, theirs)
        )


def keyed(pair: Comparison, name: str, keys: int, **params: object) -> dict:
    rows = pair.query(name, **params).fetchall()
    found = {row[:keys]: row[keys:] for row in rows}
    assert len(found) == len(rows), "keys repeat"
    return found


# ---- an independent implementation ----


@st.composite
def random_pairs(draw: st.DrawFn) -> tuple[list[Layer], list[Shard], list[Shard]]:
    """Two runs of the same documents, in other orders and other shards."""
    layers = draw(geometries())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    documents = draw(st.lists(st.tuples(st.sampled_from(LABELS), st.integers(1, 9)), min_size=1, max_size=6))
    texts = random_texts(rng, layers, documents)
    others = routed_again(rng, layers, texts)
    others = [others[place] for place in rng.permutation(len(others))]
    return layers, shards_of(texts, draw(st.integers(1, 4))), shards_of(others, draw(st.integers(1, 4)))


@few_examples
@given(
    random=random_pairs(), include_special=st.booleans(), pooled=st.booleans(), by=st.sampled_from(["margin", "lead"])
)
def test_agrees_with_numpy_on_random_runs(random, include_special, pooled, by) -> None:
    layers, ours, theirs = random
    found = reference.pairs(layers, ours, theirs, include_special=include_special)
    given = {"include_special": include_special, "pooled": pooled}
    with opened(layers, ours, theirs) as pair:
        assert_same(keyed(pair, "router_saturation", 4, **given), reference.router_saturation(found, pooled=pooled))
        assert_same(
            keyed(pair, "quantization_fidelity", 5, by=by, **given),
            reference.quantization_fidelity(found, pooled=pooled, by=by),
        )


# ---- invariants ----


@pytest.fixture(scope="module")
def texts() -> Texts:
    documents = [("en", 30), ("ko", 25), ("en", 8), ("zz", 40), ("ko", 1)]
    return random_texts(np.random.default_rng(5), LAYERS, documents)


@pytest.fixture(scope="module")
def folder(texts: Texts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two documents to a shard."""
    return write_run(tmp_path_factory.mktemp("comparison") / "run", LAYERS, shards_of(texts, 2))


def beside(folder: Path, tmp_path: Path, texts: Texts, **settings: object) -> Comparison:
    """The run beside another one, of these texts, three to a shard."""
    return open_runs(folder, write_run(tmp_path / "other", LAYERS, shards_of(texts, 3), **settings))


def test_a_run_is_wholly_like_itself(folder: Path) -> None:
    pair = open_runs(folder, folder)
    assert {row[4] for row in pair.query("router_saturation").fetchall()} == {1}
    values = {(row[0], row[5]) for row in pair.query("quantization_fidelity").fetchall()}
    assert values == {
        ("topk_jaccard", 1), ("top1_flips", 0), ("specialization_change", 0), ("largest_specialization_change", 0),
        ("same_top_expert", 1),
    }  # fmt: skip


def test_routers_that_choose_at_random_give_the_baselines(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    layers = [Layer(layer=0, n_experts=12, top_k=4)]
    shards = [
        Shard.of_probabilities(layers, documents=[("en", 4000)], probabilities={0: rng.random((4000, 12))})
        for _ in range(2)
    ]
    pair = open_runs(*(write_run(tmp_path / str(i), layers, [shard]) for i, shard in enumerate(shards)))
    ((*_, value, baseline, n),) = pair.query("router_saturation").fetchall()
    assert value == pytest.approx(baseline, rel=0.02)
    assert n == 4000
    for metric, *_, value, baseline, n in pair.query("quantization_fidelity").fetchall():
        if metric in ("topk_jaccard", "top1_flips"):
            assert value == pytest.approx(baseline, rel=0.15 if n < 4000 else 0.03), metric


def test_deciles_are_tenths_of_the_tokens_where_no_margins_are_equal(tmp_path: Path) -> None:
    layers = [Layer(layer=0, n_experts=2, top_k=1)]
    p = np.linspace(0.6, 0.9, 100)
    shard = Shard.of_probabilities(layers, documents=[("en", 100)], probabilities={0: np.stack([p, 1 - p], 1)})
    run = write_run(tmp_path / "run", layers, [shard])
    rows = open_runs(run, run).query("quantization_fidelity", pooled=True).filter("metric = 'top1_flips'")
    assert rows.project("decile, n").fetchall() == [(0, 100), *((decile, 10) for decile in range(1, 11))]


# ---- any query, with the other run's rows beside ----


def test_any_query_has_the_other_runs_values_beside_its_own(folder: Path, texts: Texts, tmp_path: Path) -> None:
    other = routed_again(np.random.default_rng(9), LAYERS, texts)
    pair = beside(folder, tmp_path, other)
    ours, theirs = open_run(folder), open_run(tmp_path / "other")
    for query in list_queries():
        columns = ours.query(query.name).columns
        keys = query.keys(columns)
        together = pair.query(query.name)
        assert together.columns[: len(keys)] == keys
        for run, suffix in ((ours, ""), (theirs, "_beside")):
            values = [name for name in columns if name not in keys]
            shown = together.project(", ".join([*keys, *(name + suffix for name in values)])).fetchall()
            alone = run.query(query.name).project(", ".join([*keys, *values])).fetchall()
            found = {
                row[: len(keys)]: row[len(keys) :] for row in shown if any(x is not None for x in row[len(keys) :])
            }
            assert_same(found, {row[: len(keys)]: row[len(keys) :] for row in alone})
        if "value" in columns:
            differences = together.project("difference, value_beside - value").fetchall()
            assert all(given == pytest.approx(expected) for given, expected in differences)


def test_rows_that_only_one_run_has_stand_alone(tmp_path: Path) -> None:
    layers = [Layer(layer=0, n_experts=3, top_k=1)]
    shards = [Shard.of_picks(layers, documents=[("en", 2)], experts={0: picks}) for picks in ([0, 0], [1, 1])]
    pair = open_runs(*(write_run(tmp_path / str(i), layers, [shard]) for i, shard in enumerate(shards)))
    rows = pair.query("top_experts").filter("metric = 'top1'").project("rank, expert, expert_beside, difference")
    assert rows.fetchall() == [(1, 0, 1, 0)]
    counts = pair.query("expert_token_overlap").project("expert, other_expert, n, n_beside").fetchall()
    assert counts == []


@pytest.mark.parametrize("query", list_queries(), ids=lambda query: query.name)
def test_the_grain_names_the_columns_that_tell_rows_apart(query, folder: Path) -> None:
    relation = opened_once(folder).query(query.name)
    keys = query.keys(relation.columns)
    assert keys == relation.columns[: len(keys)] or query.name == "top_experts"
    rows = relation.aggregate(f"count(*) as rows, {', '.join(keys)}", ", ".join(keys))
    assert rows.filter("rows > 1").fetchall() == []


def test_a_layer_of_one_run_shows_the_decisions_of_both(folder: Path, texts: Texts, tmp_path: Path) -> None:
    pair = beside(folder, tmp_path, routed_again(np.random.default_rng(9), LAYERS, texts))
    trace = pair.query("token_trace", document="text 3", layer=0, include_special=True)
    rows = trace.project("position, token_id, token_id_beside, experts, experts_beside").fetchall()
    assert len(rows) == 40
    assert all(ours == theirs for _, ours, theirs, *_ in rows)
    assert any(ours != theirs for *_, ours, theirs in rows)


# ---- what is refused ----


def changed(texts: Texts, place: int, **fields: object) -> Texts:
    return [dataclasses.replace(text, **fields) if i == place else text for i, text in enumerate(texts)]


def refusal(pair: Comparison, name: str = "router_saturation", **params: object) -> str:
    with pytest.raises(ValueError, match="cannot be compared: ") as error:
        pair.query(name, **params)
    return str(error.value).partition("cannot be compared: ")[2].replace(pair.names[0], "A").replace(pair.names[1], "B")


def test_a_document_that_only_one_run_has(folder: Path, texts: Texts, tmp_path: Path) -> None:
    pair = beside(folder, tmp_path, texts[1:])
    assert refusal(pair) == "documents: 1 only in A, first 'text 0' (en)"
    assert refusal(pair, "effective_experts") == "documents: 1 only in A, first 'text 0' (en)"
    assert pair.query("router_saturation", labels=["ko", "zz"]).fetchall(), "the other labels can be compared"
    renamed = open_runs(tmp_path / "other", folder)
    assert refusal(renamed) == "documents: 1 only in B, first 'text 0' (en)"


def test_a_label_that_differs(folder: Path, texts: Texts, tmp_path: Path) -> None:
    pair = beside(folder, tmp_path, changed(texts, 3, documents=[("yy", 40)]))
    assert refusal(pair) == "labels: 1 documents, first 'text 3', 'zz' in A and 'yy' in B"
    assert pair.query("router_saturation", labels=["ko"]).fetchall()


def test_tokens_that_differ_in_number(folder: Path, texts: Texts, tmp_path: Path) -> None:
    shorter = random_texts(np.random.default_rng(1), LAYERS, [("en", 29)])
    pair = beside(folder, tmp_path, shorter + texts[1:])
    assert refusal(pair) == "tokens: 1 documents differ, first 'text 0' (en) with 30 in A and 29 in B"


def test_a_token_that_differs(folder: Path, texts: Texts, tmp_path: Path) -> None:
    ids = texts[2].token_ids.copy()
    ids[5] = ids[5] + 1
    pair = beside(folder, tmp_path, changed(texts, 2, token_ids=ids))
    expected = f"at decoder position 5: id {ids[5] - 1} in A and {ids[5]} in B"
    assert refusal(pair) == f"tokens: 1 documents differ, first 'text 2' (en) {expected}"


def test_a_token_that_is_special_in_one_run(folder: Path, texts: Texts, tmp_path: Path) -> None:
    special = texts[0].is_special.copy()
    special[7] = ~special[7]
    pair = beside(folder, tmp_path, changed(texts, 0, is_special=special))
    assert f"position 7: special only in {'B' if special[7] else 'A'}" in refusal(pair)


def test_a_vocabulary_that_differs(folder: Path, texts: Texts, tmp_path: Path) -> None:
    vocabulary = [*VOCABULARY_ENTRIES]
    vocabulary[9:11] = [("x", False), ("y", False)]
    pair = beside(folder, tmp_path, texts, vocabulary=vocabulary)
    assert refusal(pair) == "vocabulary: 2 entries, first id 9, 'token 9' in A and 'x' in B"


def test_everything_that_differs_is_named_at_once(folder: Path, texts: Texts, tmp_path: Path) -> None:
    vocabulary = [*VOCABULARY_ENTRIES, ("more", False)]
    message = refusal(
        beside(folder, tmp_path, changed(texts[1:], 0, is_special=~texts[1].is_special), vocabulary=vocabulary)
    )
    assert [part.split(":")[0] for part in message.split("; ")] == ["vocabulary", "documents", "tokens"]


def test_routers_that_differ(folder: Path, texts: Texts, tmp_path: Path) -> None:
    wide, missing = Layer(layer=0, n_experts=9, top_k=3), Layer(layer=8, n_experts=5, top_k=1)
    layers = [wide, missing]
    other = [dataclasses.replace(text, experts={0: np.tile([0, 4, 8], (len(text.is_special), 1)).astype(np.uint8),
                                               8: text.experts[3]},
                                 weights={0: np.full((len(text.is_special), 3), 0.25, np.float32), 8: text.weights[3]},
                                 statistics={0: text.statistics[0], 8: text.statistics[3]})
             for text in texts]  # fmt: skip
    pair = open_runs(folder, write_run(tmp_path / "other", layers, [joined_routing(each) for each in other], record=()))
    only = "(--stack and --layer choose among others)"
    assert refusal(pair) == (
        f"routers: decoder layer 3 only in A {only}; routers: decoder layer 8 only in B {only}; "
        "E: decoder layer 0 has 7 experts in A and 9 experts in B; "
        "k: decoder layer 0 has 2 chosen per token in A and 3 chosen per token in B"
    )
    assert refusal(pair, layer=0).startswith("E: decoder layer 0")
    assert refusal(pair, "selection_frequency", layer=0).startswith("E: decoder layer 0")
    sizes = pair.query("effective_experts", layer=0).project("baseline, baseline_beside").distinct().fetchall()
    assert sizes == [(7, 9)], "a measure of no single expert compares models of any size"
    assert pair.query("fertility").fetchall(), "texts need no router"


def joined_routing(shard: Shard) -> Shard:
    return dataclasses.replace(shard, probabilities=None)


def test_a_query_of_two_runs_is_no_question_to_one(folder: Path) -> None:
    for query in list_comparisons():
        with pytest.raises(ValueError, match=f"{query.name} compares two runs: name the other one with --beside"):
            open_run(folder).query(query.name)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"layr": 1}, "router_saturation has no parameter 'layr'"),
        ({"layer": 1}, "layer 1 is not recorded in this run; it has 0, 3"),
        ({"labels": "xx"}, "no document of this run has the label 'xx'"),
    ],
)
def test_a_mistake_is_named(folder: Path, params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_runs(folder, folder).query("router_saturation", **params)


def test_deciles_are_by_margin_or_by_lead(folder: Path) -> None:
    with pytest.raises(duckdb.Error, match="by takes margin or lead"):
        open_runs(folder, folder).query("quantization_fidelity", by="luck").fetchall()


# ---- labels that are groups ----


def test_groups_of_tokens_leave_no_document_unchecked(folder: Path, texts: Texts, tmp_path: Path) -> None:
    write_run(tmp_path / "same", LAYERS, shards_of(routed_again(np.random.default_rng(9), LAYERS, texts), 3))
    pair = open_runs(folder, tmp_path / "same", by="position")
    rows = pair.query("router_saturation", include_special=True).project("label, n").distinct().fetchall()
    alone = open_run(folder, by="position").query("router_entropy", include_special=True).project("label, n").distinct()
    assert sorted(rows) == sorted(alone.fetchall())
    assert pair.query("router_saturation", labels=[rows[0][0]]).fetchall()
    write_run(tmp_path / "fewer", LAYERS, shards_of(texts[1:], 3))
    fewer = open_runs(folder, tmp_path / "fewer", by="position")
    assert refusal(fewer, labels=[rows[0][0]]) == "documents: 1 only in A, first 'text 0' (en)"


# ---- runs without comparable token ids ----


def without_ids(texts: Texts) -> Texts:
    return [dataclasses.replace(text, token_ids=np.full(len(text.is_special), None)) for text in texts]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"token_ids": "drop"}, "vocabulary and token ids, for {other} has none"),
        (
            {"token_ids": "hash", "token_key_fingerprint": "f"},
            "vocabulary and token ids, for those of {other} are hashed",
        ),
    ],
)
def test_what_cannot_be_compared_is_told(settings, reason, folder: Path, texts: Texts, tmp_path: Path) -> None:
    pair = beside(folder, tmp_path, without_ids(texts), settings=settings, vocabulary=None)
    assert pair.unchecked() == (reason.format(other=pair.names[1]),)
    assert {row[4] for row in pair.query("router_saturation").fetchall()} == {1}
    shutil.rmtree(tmp_path / "other")
    special = without_ids(changed(texts, 0, is_special=~texts[0].is_special))
    assert "position 0: special only in" in refusal(
        beside(folder, tmp_path, special, settings=settings, vocabulary=None)
    )


def test_ids_hashed_with_one_key_are_compared_and_with_two_are_not(texts: Texts, tmp_path: Path) -> None:
    roots = {}
    for key in ("a", "a again", "b"):
        settings = {"token_ids": "hash", "token_key_fingerprint": key[0]}
        roots[key] = write_run(tmp_path / key, LAYERS, shards_of(texts, 1), settings=settings, vocabulary=None)
    assert open_runs(roots["a"], roots["a again"]).unchecked() == ()
    assert open_runs(roots["a"], roots["b"]).unchecked() == (
        "vocabulary and token ids, for they are hashed with different keys",
    )


def test_tokenizers_of_other_sizes_differ_even_where_no_ids_are_stored(texts: Texts, tmp_path: Path) -> None:
    roots = []
    for entries in (100, 2000):
        settings = {"token_ids": "drop"}
        root = write_run(
            tmp_path / str(entries), LAYERS, shards_of(without_ids(texts), 1), settings=settings, vocabulary=None
        )
        info = json.loads((root / "run.json").read_text())
        (root / "run.json").write_text(json.dumps(info | {"tokenizer": {"entries": entries}}))
        roots.append(root)
    assert refusal(open_runs(*roots)) == "tokenizer: 100 entries in A and 2,000 in B"


# ---- one DuckDB ----


def test_each_run_answers_for_itself(folder: Path, texts: Texts, tmp_path: Path) -> None:
    pair = beside(folder, tmp_path, routed_again(np.random.default_rng(9), LAYERS, texts))
    for run, alone in ((pair.run, open_run(folder)), (pair.other, open_run(tmp_path / "other"))):
        question = "select count(distinct shard), min(e0), max(w0) from routing"
        assert run.sql(question).fetchall() == alone.sql(question).fetchall()
        assert_same_rows(run.query("selection_frequency").fetchall(), alone.query("selection_frequency").fetchall())


def test_the_duckdb_of_two_runs_is_locked_as_that_of_one(folder: Path, tmp_path: Path) -> None:
    pair = open_runs(folder, folder)
    for statement in ("from read_text('/etc/passwd')", f"copy (select 1) to '{tmp_path}/x.csv'", "set threads = 1"):
        with pytest.raises(duckdb.Error, match=r"disabled|locked|cannot be"):
            pair.run.connection.execute(statement).fetchall()
    assert list(tmp_path.iterdir()) == []
    tables = pair.run.sql("select count(*) from other.routing").fetchall()
    assert tables == pair.run.sql("select count(*) from routing").fetchall()
