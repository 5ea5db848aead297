"""Every query against cases worked out by hand, an independent implementation, and invariants."""

from __future__ import annotations

import csv
import json
import math
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import reference
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from synthetic import Shard, random_shard, write_run
from synthetic import key as router_key

from collector.records import Layer
from collector.warehouse import Run, list_queries, open_run

CASES = Path(__file__).parent / "cases"
QUERIES = [query.name for query in list_queries()]

UNEQUAL = (
    Layer(layer=0, n_experts=7, top_k=1),
    Layer(layer=2, n_experts=6, top_k=6),
    Layer(layer=3, n_experts=300, top_k=3),
)


# ---- worked out by hand ----


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file; lines that begin with # explain."""
    lines = (line for line in path.read_text().splitlines() if not line.startswith("#"))
    return list(csv.DictReader(lines))


def case_layers(case: Path) -> list[Layer]:
    return [
        Layer(
            stack=row["stack"], layer=int(row["layer"]), n_experts=int(row["n_experts"]), top_k=int(row["top_k"]),
            has_capacity=row["has_capacity"] == "1",
        )
        for row in read_csv(case / "layers.csv")
    ]  # fmt: skip


def case_shards(case: Path) -> list[Shard]:
    """Every row is a document of one token; routers repeat the same tokens."""
    layers, rows = case_layers(case), read_csv(case / "picks.csv")
    return [
        case_shard(layers, [row for row in rows if row["shard"] == number])
        for number in sorted({r["shard"] for r in rows})
    ]


def case_shard(layers: list[Layer], rows: list[dict[str, str]]) -> Shard:
    of_router = {
        router_key(one): [row for row in rows if (row["stack"], row["layer"]) == (one.stack, str(one.layer))]
        for one in layers
    }
    tokens = of_router[router_key(layers[0])]
    given = {
        name: {router: [[float(x) for x in row[name].split()] for row in rows] for router, rows in of_router.items()}
        for name in ("experts", "weights", "probabilities", "dropped")
        if name in tokens[0]
    }
    build = Shard.of_probabilities if "probabilities" in given else Shard.of_picks
    documents = [(row["label"], 1) for row in tokens]
    return build(layers, documents=documents, is_special=[row["special"] == "1" for row in tokens], **given)


def same(actual: object, expected: str, rounding: float) -> bool:
    """A cell of expected.csv: a fraction, a number to six places, a text, or nothing for null."""
    if expected == "" or actual is None or isinstance(actual, str):
        return (actual or "") == expected
    return math.isclose(actual, Fraction(expected), abs_tol=1e-6, rel_tol=rounding)


@pytest.mark.parametrize("case", sorted(CASES.glob("*/*")), ids=lambda case: f"{case.parent.name}/{case.name}")
def test_a_case_worked_out_by_hand(case: Path, tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path / "run", case_layers(case), case_shards(case)))
    relation = run.query(case.parent.name, **json.loads((case / "params.json").read_text()))
    actual = [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()]
    expected = read_csv(case / "expected.csv")
    rounding = 2.5e-4 if case.parent.name == "router_entropy" else 0  # recorded with 11 significant bits
    assert len(actual) == len(expected), actual
    for got, wanted in zip(actual, expected, strict=True):
        wrong = [name for name, cell in wanted.items() if not same(got[name], cell, rounding)]
        assert not wrong, f"{wrong} differ: got {got}, worked out {wanted}"


def test_every_query_has_a_case() -> None:
    assert {case.parent.name for case in CASES.glob("*/*")} == set(QUERIES)


# ---- an independent implementation ----


@st.composite
def geometries(draw: st.DrawFn) -> list[Layer]:
    stacks = st.sampled_from(["decoder", "decoder.mlp", "encoder"])
    routers = draw(st.lists(st.tuples(stacks, st.integers(0, 255)), min_size=1, max_size=3, unique=True))
    sizes = [draw(st.integers(1, 12)) for _ in routers]
    return [
        Layer(
            stack=stack, layer=number, n_experts=size, top_k=draw(st.integers(1, size)),
            has_capacity=draw(st.booleans()),
        )
        for (stack, number), size in zip(routers, sizes, strict=True)
    ]  # fmt: skip


DOCUMENTS = st.lists(
    st.tuples(st.sampled_from(["en", "ko", "o'brien", "zh-Hant"]), st.integers(1, 9)), min_size=1, max_size=6
)


def keyed(run: Run, name: str, keys: int, **params: object) -> dict:
    rows = run.query(name, **params).fetchall()
    found = {row[:keys]: row[keys:] for row in rows}
    assert len(found) == len(rows), "keys repeat"
    assert list(found) == sorted(found), "not ordered by the keys"
    return found


def assert_same(actual: dict, expected: dict) -> None:
    assert set(actual) == set(expected)
    for key, values in expected.items():
        for got, wanted in zip(actual[key], values, strict=True):
            assert got == (wanted if wanted is None else pytest.approx(wanted, rel=1e-9, abs=1e-9)), (key, values)


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    layers=geometries(), shards=st.lists(DOCUMENTS, min_size=1, max_size=3), seed=st.integers(0, 2**32 - 1),
    include_special=st.booleans(), m=st.none() | st.integers(1, 14), n=st.integers(1, 14),
)  # fmt: skip
def test_agrees_with_numpy_on_random_runs(layers, shards, seed, include_special, m, n) -> None:
    rng = np.random.default_rng(seed)
    written = [random_shard(rng, layers, documents, special=0.3) for documents in shards]
    with tempfile.TemporaryDirectory() as folder:
        run = open_run(write_run(Path(folder, "run"), layers, written))
        found = list(reference.groups(layers, written, include_special=include_special))
        special = {"include_special": include_special}
        assert_same(keyed(run, "selection_frequency", 5, **special), reference.selection_frequency(found))
        assert_same(keyed(run, "domain_specialization", 5, **special), reference.domain_specialization(found))
        assert_same(keyed(run, "language_overlap", 5, m=m, **special), reference.language_overlap(found, m))
        assert_same(keyed(run, "router_entropy", 4, **special), reference.router_entropy(found))
        assert_same(keyed(run, "top_experts", 5, n=n, **special), reference.top_experts(found, n))
        assert_same(keyed(run, "effective_experts", 4, **special), reference.effective_experts(found))
        assert_same(keyed(run, "dropped_tokens", 4, **special), reference.dropped_tokens(found))
        stack = layers[0].stack
        one_stack = [group for group in found if group.geometry.stack == stack]
        assert_same(keyed(run, "effective_experts", 4, stack=stack, **special), reference.effective_experts(one_stack))


@pytest.mark.parametrize(("e", "a", "b"), [(64, 8, 8), (512, 10, 10), (6, 6, 6), (5, 1, 1), (9, 7, 4)])
def test_expected_jaccard_is_the_mean_over_random_sets(e: int, a: int, b: int) -> None:
    rng = np.random.default_rng(0)
    draws = [(set(rng.permutation(e)[:a].tolist()), set(rng.permutation(e)[:b].tolist())) for _ in range(3000)]
    mean = np.mean([len(x & y) / len(x | y) for x, y in draws])
    assert reference.expected_jaccard(e, a, b) == pytest.approx(mean, abs=0.02)


# ---- invariants ----


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two shards; layers with k = 1, k = E and E > 255."""
    rng = np.random.default_rng(1)
    documents = [[("en", 90), ("ko", 40), ("en", 30)], [("ko", 50), ("th", 1)]]
    shards = [random_shard(rng, UNEQUAL, each) for each in documents]
    return open_run(write_run(tmp_path_factory.mktemp("unequal") / "run", UNEQUAL, shards))


def test_shares_sum_to_one_and_selection_frequency_to_k(unequal: Run) -> None:
    sums = unequal.query("selection_frequency", include_special=True).aggregate(
        "metric, layer, sum(value) as total", "metric, layer, label"
    )
    k = {one.layer: one.top_k for one in UNEQUAL}
    for metric, layer, total in sums.fetchall():
        assert total == pytest.approx(k[layer] if metric == "selection_frequency" else 1), (metric, layer)


def test_every_expert_of_a_layer_appears_for_every_label(unequal: Run) -> None:
    rows = unequal.query("domain_specialization", include_special=True).fetchall()
    assert len(rows) == 3 * sum(one.n_experts for one in UNEQUAL)
    assert any(value == 0 for *_, value in (row[:6] for row in rows))


def test_overlap_is_symmetric_and_complete_with_itself(unequal: Run) -> None:
    values = {row[:5]: row[5] for row in unequal.query("language_overlap").fetchall()}
    for (metric, stack, layer, a, b), value in values.items():
        assert values[metric, stack, layer, b, a] == value
        assert -1e-12 <= value <= 1 + 1e-12
        if a == b:
            assert value == pytest.approx(0 if metric == "jsd" else 1, abs=1e-12)


def test_a_layer_that_takes_all_experts_shows_no_difference(unequal: Run) -> None:
    for metric, _, _, _, _, value, *_ in unequal.query("language_overlap", layer=2).fetchall():
        assert value == pytest.approx(0 if metric == "jsd" else 1, abs=1e-12)
    for *_, value, _, _ in unequal.query("effective_experts", layer=2).project("value, baseline, n").fetchall():
        assert value == pytest.approx(6)


def test_entropies_and_effective_experts_stay_in_range(unequal: Run) -> None:
    upper = {(m, layer): b for m, _, layer, _, _, b, *_ in unequal.query("router_entropy").fetchall() if "entropy" in m}
    for metric, _, layer, _, value, *_ in unequal.query("router_entropy").fetchall():
        assert 0 <= value <= upper.get((metric, layer), 1) + 1e-3, metric
    for _, _, layer, _, value, baseline, n, *_ in unequal.query("effective_experts").fetchall():
        k = {one.layer: one.top_k for one in UNEQUAL}[layer]
        assert 1 - 1e-9 <= value <= min(baseline, n * k) + 1e-9


def test_one_expert_per_token_has_no_weight_entropy(unequal: Run) -> None:
    rows = [row for row in unequal.query("router_entropy", layer=0).fetchall() if row[0] == "weight_entropy"]
    assert {row[4:6] for row in rows} == {(0, 0)}


# ---- edges ----


def test_special_tokens_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    layers = [Layer(layer=0, n_experts=3, top_k=1)]
    shard = Shard.of_picks(
        layers, documents=[("en", 2), ("bos", 1)], experts={0: [0, 1, 2]}, is_special=[False, True, True]
    )
    run = open_run(write_run(tmp_path / "run", layers, [shard]))
    assert run.query("effective_experts").project("label, value, n").fetchall() == [("en", 1, 1)]
    everything = run.query("effective_experts", include_special="true").project("label, value, n").fetchall()
    assert everything == [("bos", 1, 1), ("en", pytest.approx(2), 2)]
    for name in QUERIES:  # a label of special tokens only: no rows, no division by zero
        assert run.query(name, labels=["bos"]).fetchall() == []


def test_a_label_can_hold_a_quote_or_a_comma(tmp_path: Path) -> None:
    layers = [Layer(layer=0, n_experts=2, top_k=1)]
    shard = Shard.of_picks(layers, documents=[("o'brien", 1), ("a,b", 2)], experts={0: [0, 1, 1]})
    run = open_run(write_run(tmp_path / "run", layers, [shard]))
    assert {row[3] for row in run.query("top_experts", labels="o'brien").fetchall()} == {"o'brien"}
    assert {row[3] for row in run.query("top_experts", labels=["a,b"]).fetchall()} == {"a,b"}
    assert run.sql("select tokens from labels where label = 'o''brien'").fetchall() == [(1,)]


@pytest.mark.parametrize("name", QUERIES)
def test_a_run_without_a_commit_has_no_rows(name: str, tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path / "run", UNEQUAL, [], complete=False))
    assert run.query(name).fetchall() == []
