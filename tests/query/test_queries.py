"""Every query against cases worked out by hand; the frequency family against numpy and its invariants.

The other families have files of their own, `test_queries_*.py`.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import duckdb
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.capture.similarity import LISTS
from collector.capture.vocabulary import PROMOTED
from collector.query.comparison import list_comparisons, open_runs
from collector.query.warehouse import Run, list_queries, open_run
from collector.store.tables import Layer
from tests.helpers.query_runs import assert_same, few_examples, keyed, opened, random_runs
from tests.helpers.reference import frequency
from tests.helpers.reference.base import groups
from tests.helpers.synthetic import EFFECTS, Shard, random_shard, write_run
from tests.helpers.synthetic import key as router_key

CASES = Path(__file__).parent / "cases"
QUERIES = [query.name for query in list_queries()]
COMPARISONS = [query.name for query in list_comparisons()]

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


def case_shards(case: Path, picks: str = "picks.csv") -> list[Shard]:
    """Rows are tokens, and documents of their own unless a column `doc` says which; routers repeat the tokens."""
    layers, rows = case_layers(case), read_csv(case / picks)
    shards = [
        case_shard(layers, [row for row in rows if row["shard"] == number])
        for number in sorted({r["shard"] for r in rows})
    ]
    if (case / "similarity.csv").exists():
        blocks = read_csv(case / "similarity.csv")
        shards = [
            dataclasses.replace(shard, similarity=[block(row) for row in blocks if row["shard"] == str(number)])
            for number, shard in enumerate(shards)
        ]
    if (case / "promotions.csv").exists():
        rows = read_csv(case / "promotions.csv")
        shards = [
            dataclasses.replace(shard, promotions=[promotion(row) for row in rows if row["shard"] == str(number)])
            for number, shard in enumerate(shards)
        ]
    if (case / "effects.csv").exists():
        rows = read_csv(case / "effects.csv")
        shards = [
            dataclasses.replace(shard, arms=[effect(row) for row in rows if row["shard"] == str(number)])
            for number, shard in enumerate(shards)
        ]
    return shards


def effect(row: dict[str, str]) -> dict[str, object]:
    """A row of effects.csv."""
    numbers = {name: float(row[name]) for name in ("loss", "base_loss", "divergence")}
    counts = {name: int(row[name]) for name in ("doc", "control", "tokens", "flips", "decisions", "rerouted")}
    return {"arm": row["arm"]} | numbers | counts


def promotion(row: dict[str, str]) -> dict[str, object]:
    """A row of promotions.csv."""
    numbers = {name: int(row[name]) for name in ("layer", "tok", "expert", *PROMOTED)}
    return {"stack": row["stack"], "attribution": float(row["attribution"]) if row["attribution"] else None} | numbers


def block(row: dict[str, str]) -> dict[str, object]:
    """A row of similarity.csv: lists are over the pairs of experts."""
    counts = {name: int(row[name]) for name in ("layer", "block", "tokens", "experts")}
    lists = {name: [float(cell) for cell in row[name].split()] for name in LISTS if name != "n"}
    return {"stack": row["stack"], "over": row["over"], "n": [*map(int, row["n"].split())]} | counts | lists


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
    if EFFECTS[0] in tokens[0]:
        given["effects"] = {
            router: {name: [[float(x) for x in row[name].split()] for row in rows] for name in EFFECTS}
            for router, rows in of_router.items()
        }
    if "loss" in tokens[0]:
        given["losses"] = [float(row["loss"] or "nan") for row in tokens]
    build = Shard.of_probabilities if "probabilities" in given else Shard.of_picks
    groups = itertools.groupby(enumerate(tokens), key=lambda numbered: numbered[1].get("doc", numbered[0]))
    texts = [[row for _, row in group] for _, group in groups]
    shard = build(
        layers, documents=[(rows[0]["label"], len(rows)) for rows in texts],
        is_special=[row["special"] == "1" for row in tokens], **given,
    )  # fmt: skip
    return dataclasses.replace(
        shard,
        token_ids=np.array([int(row["token_id"]) for row in tokens]) if "token_id" in tokens[0] else None,
        characters=np.array([int(rows[0]["characters"]) for rows in texts]) if "characters" in tokens[0] else None,
        prompt_tokens=np.array([sum(row["phase"] == "prompt" for row in rows) for rows in texts])
        if "phase" in tokens[0]
        else None,
        truncated=np.array([rows[0].get("truncated") == "1" for rows in texts]),
        parallel_ids=[rows[0].get("parallel_id") for rows in texts],
        document_ids=[rows[0]["doc_id"] for rows in texts] if "doc_id" in tokens[0] else None,
    )


def same(actual: object, expected: str, rounding: float) -> bool:
    """A cell of expected.csv: a fraction, a number to six places, a text, nothing for null, or a list of these."""
    if isinstance(actual, list):
        cells = expected.split()
        return len(actual) == len(cells) and all(same(*each, rounding) for each in zip(actual, cells, strict=True))
    if isinstance(actual, bool):
        return str(actual).lower() == expected
    if expected == "" or actual is None or isinstance(actual, str):
        return (actual or "") == expected
    return math.isclose(actual, Fraction(expected), abs_tol=1e-6, rel_tol=rounding)


@pytest.mark.parametrize("case", sorted(CASES.glob("*/*")), ids=lambda case: f"{case.parent.name}/{case.name}")
def test_a_case_worked_out_by_hand(case: Path, tmp_path: Path) -> None:
    layers, shards = case_layers(case), case_shards(case)
    store = () if shards[0].probabilities is None else ("probabilities", "logits")
    weights = read_csv(case / "weights.csv") if (case / "weights.csv").exists() else ()
    numbers = [
        row | {name: float(row[name]) for name in ("layer", "expert", "other_expert", "value")} for row in weights
    ]
    maps = read_csv(case / "maps.csv") if (case / "maps.csv").exists() else ()
    points = [row | {name: float(row[name]) for name in row if name not in ("stack", "method")} for row in maps]
    folder = write_run(tmp_path / "run", layers, shards, store=store, weights=numbers, maps=points)
    if (case / "other.csv").exists():
        run = open_runs(folder, write_run(tmp_path / "other", layers, case_shards(case, "other.csv")))
    else:
        run = open_run(folder)
    relation = run.query(case.parent.name, **json.loads((case / "params.json").read_text()))
    actual = [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()]
    expected = read_csv(case / "expected.csv")
    rounding = 2.5e-4 if case.parent.name.startswith("router_") else 0  # recorded with 12 significant bits
    assert len(actual) == len(expected), actual
    for got, wanted in zip(actual, expected, strict=True):
        wrong = [name for name, cell in wanted.items() if not same(got[name], cell, rounding)]
        assert not wrong, f"{wrong} differ: got {got}, worked out {wanted}"


def test_every_query_has_a_case() -> None:
    assert {case.parent.name for case in CASES.glob("*/*")} == {*QUERIES, *COMPARISONS}


# ---- an independent implementation ----


@few_examples
@given(
    random=random_runs(), include_special=st.booleans(), m=st.none() | st.integers(1, 14), n=st.integers(1, 14),
    share=st.sampled_from(["0.25", "0.5", "0.8", "1"]),
)  # fmt: skip
def test_agrees_with_numpy_on_random_runs(random, include_special, m, n, share) -> None:
    layers, shards = random
    with opened(layers, shards) as run:
        found = list(groups(layers, shards, include_special=include_special))
        special = {"include_special": include_special}
        assert_same(keyed(run, "selection_frequency", 5, **special), frequency.selection_frequency(found))
        assert_same(keyed(run, "domain_specialization", 5, **special), frequency.domain_specialization(found))
        assert_same(keyed(run, "language_overlap", 5, m=m, **special), frequency.language_overlap(found, m))
        assert_same(keyed(run, "committee", 3, m=m, share=share, **special), frequency.committee(found, m, share))
        assert_same(keyed(run, "router_entropy", 4, **special), frequency.router_entropy(found))
        quantiles = frequency.router_entropy_quantiles(found)
        assert_same(keyed(run, "router_entropy_quantiles", 4, **special), quantiles)
        assert_same(keyed(run, "top_experts", 5, n=n, **special), frequency.top_experts(found, n))
        assert_same(keyed(run, "effective_experts", 4, **special), frequency.effective_experts(found))
        assert_same(keyed(run, "dropped_tokens", 4, **special), frequency.dropped_tokens(found))
        assert_same(keyed(run, "language_divergence", 3, **special), frequency.language_divergence(found))
        stack = layers[0].stack
        one_stack = [group for group in found if group.geometry.stack == stack]
        assert_same(keyed(run, "effective_experts", 4, stack=stack, **special), frequency.effective_experts(one_stack))


@pytest.mark.parametrize(("e", "a", "b"), [(64, 8, 8), (512, 10, 10), (6, 6, 6), (5, 1, 1), (9, 7, 4)])
def test_expected_jaccard_is_the_mean_over_random_sets(e: int, a: int, b: int) -> None:
    rng = np.random.default_rng(0)
    draws = [(set(rng.permutation(e)[:a].tolist()), set(rng.permutation(e)[:b].tolist())) for _ in range(3000)]
    mean = np.mean([len(x & y) / len(x | y) for x, y in draws])
    assert frequency.expected_jaccard(e, a, b) == pytest.approx(mean, abs=0.02)


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


def test_a_committees_jaccard_is_the_mean_of_the_overlaps_of_different_labels(unequal: Run) -> None:
    overlaps = unequal.query("language_overlap", m=2).filter("metric = 'jaccard' and label_a < label_b")
    means = overlaps.aggregate("layer, avg(value), avg(baseline), count(*)", "layer").order("layer").fetchall()
    found = unequal.query("committee", m=2).filter("metric = 'mean_jaccard'").project("layer, value, baseline, 3")
    assert found.fetchall() == [pytest.approx(row) for row in means]


@pytest.mark.parametrize(
    ("name", "given"), [("committee", {"share": 0}), ("committee", {"share": 1.1}), ("dynamic_k", {"mass": 0})]
)
def test_a_share_is_above_0_and_at_most_1(name: str, given: dict[str, float], unequal: Run) -> None:
    with pytest.raises(duckdb.Error, match=r"(share|mass) is above 0 and at most 1"):
        unequal.query(name, **given).fetchall()


def test_a_layer_that_takes_all_experts_shows_no_difference(unequal: Run) -> None:
    for metric, _, _, _, _, value, *_ in unequal.query("language_overlap", layer=2).fetchall():
        assert value == pytest.approx(0 if metric == "jsd" else 1, abs=1e-12)
    for *_, value, _, _ in unequal.query("effective_experts", layer=2).project("value, baseline, n").fetchall():
        assert value == pytest.approx(6)


def test_entropies_and_effective_experts_stay_in_range(unequal: Run) -> None:
    upper = {(m, layer): b for m, _, layer, _, _, b, _ in unequal.query("router_entropy").fetchall() if "entropy" in m}
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
    for name in {*QUERIES} - {
        "expert_similarity",
        "weight_similarity",
    }:  # a label of special tokens only: no rows, no division by zero
        asked = {"include_special": False} if name == "super_experts" else {}  # which counts them, unless told not to
        assert run.query(name, labels=["bos"], **asked).fetchall() == []


def test_a_label_can_hold_a_quote_or_a_comma(tmp_path: Path) -> None:
    layers = [Layer(layer=0, n_experts=2, top_k=1)]
    shard = Shard.of_picks(layers, documents=[("o'brien", 1), ("a,b", 2)], experts={0: [0, 1, 1]})
    run = open_run(write_run(tmp_path / "run", layers, [shard]))
    assert {row[3] for row in run.query("top_experts", labels="o'brien").fetchall()} == {"o'brien"}
    assert {row[3] for row in run.query("top_experts", labels=["a,b"]).fetchall()} == {"a,b"}
    assert run.sql("select tokens from labels where label = 'o''brien'").fetchall() == [(1,)]


@pytest.fixture(scope="module")
def uncommitted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_run(write_run(tmp_path_factory.mktemp("uncommitted") / "run", UNEQUAL, [], complete=False))


@pytest.mark.parametrize("name", QUERIES)
def test_a_run_without_a_commit_has_no_rows(name: str, uncommitted: Run) -> None:
    assert uncommitted.query(name).fetchall() == []
