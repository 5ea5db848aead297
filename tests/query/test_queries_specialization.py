"""Log-odds, difference to a reference, mutual information, vocabulary: definitions, limits, chance."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.query.warehouse import Run, open_run
from collector.store.tables import Layer
from tests.helpers.query_runs import LABELS, VOCABULARY, assert_same, few_examples, keyed, opened, random_runs
from tests.helpers.reference import specialization
from tests.helpers.reference.base import decisions, groups
from tests.helpers.synthetic import Shard, random_shard, write_run

LAYERS = (Layer(layer=0, n_experts=7, top_k=2), Layer(layer=3, n_experts=5, top_k=5))


@few_examples
@given(
    random=random_runs(), include_special=st.booleans(), strength=st.sampled_from([0.1, 1.0, 50.0]),
    reference=st.sampled_from(LABELS), min_count=st.integers(1, 6), seed=st.integers(0, 9),
    token_id=st.none() | st.integers(0, VOCABULARY - 1),
)  # fmt: skip
def test_agrees_with_numpy_on_random_runs(
    random, include_special, strength, reference, min_count, seed, token_id
) -> None:
    layers, shards = random
    found = list(groups(layers, shards, include_special=include_special))
    decided = decisions(layers, shards, include_special=include_special)
    special = {"include_special": include_special}
    with opened(layers, shards) as run:
        rows = run.sql(f"select shard, tok, hash(shard, tok, {seed}) from tokens").fetchall()
        lots = {(shard, tok): lot for shard, tok, lot in rows}
        assert_same(keyed(run, "log_odds", 5, strength=strength, **special), specialization.log_odds(found, strength))
        assert_same(
            keyed(run, "reference_difference", 5, reference=reference, **special),
            specialization.reference_difference(found, reference),
        )
        assert_same(keyed(run, "mutual_information", 3, **special), specialization.mutual_information(found))
        assert_same(
            keyed(run, "vocabulary_specialization", 4, min_count=min_count, **special),
            specialization.vocabulary_specialization(decided, min_count),
        )
        assert_same(
            keyed(run, "expert_tokens", 5, min_count=min_count, n=3, **special),
            specialization.expert_tokens(decided, min_count, 3),
        )
        assert_same(keyed(run, "label_npmi", 5, **special), specialization.label_npmi(found))
        assert_same(
            keyed(run, "token_npmi", 5, min_count=min_count, n=3, token_id=token_id, **special),
            specialization.token_npmi(decided, min_count, 3, token_id),
        )
        assert_same(
            keyed(run, "conditional_mutual_information", 3, seed=seed, **special),
            specialization.conditional_mutual_information(decided, lots),
        )


@pytest.fixture(scope="module")
def indifferent(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Uniformly random routing of 3,000 tokens of 40 ids: labels and ids say nothing."""
    rng = np.random.default_rng(4)
    tokens = 3000
    p = {one.layer: rng.random((tokens, one.n_experts)) for one in LAYERS}
    labels = [("en", 1200), ("ko", 1000), ("th", 800)]
    shard = Shard.of_probabilities(LAYERS, documents=labels, probabilities=p)
    shard = dataclasses.replace(shard, token_ids=rng.integers(0, 40, tokens))
    return open_run(write_run(tmp_path_factory.mktemp("indifferent") / "run", LAYERS, [shard]))


@pytest.fixture(scope="module")
def partial(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Routing that depends on the label."""
    rng = np.random.default_rng(5)
    documents = [("en", 90), ("ko", 40), ("th", 1), ("en", 30)]
    shards = [random_shard(rng, LAYERS, documents, vocabulary=9) for _ in range(2)]
    return open_run(write_run(tmp_path_factory.mktemp("partial") / "run", LAYERS, shards))


def test_chance_gives_the_baselines(indifferent: Run) -> None:
    z = np.array([row[5] for row in indifferent.query("log_odds", layer=0).fetchall()])
    assert abs(z.mean()) < 0.5
    assert 0.3 < z.std() < 1.3
    for *_, value, _, _ in indifferent.query("reference_difference").project("value, baseline, n").fetchall():
        assert abs(value) < 0.08
    for *_, value, picks in indifferent.query("label_npmi").project("value, picks").fetchall():
        assert picks
        assert abs(value) < 0.05
    association = [row[0] for row in indifferent.query("token_npmi", n=1000).project("value").fetchall()]
    assert len(association) == 40 * (7 + 5)
    assert abs(np.mean(association)) < 0.01
    (bits, bias), (portion, portion_bias) = (
        indifferent.query("mutual_information", layer=0).project("value, bias").fetchall()
    )
    assert bits == pytest.approx(bias, rel=0.9)
    assert portion == pytest.approx(bits / math.log2(3))
    assert portion_bias == pytest.approx(bias / math.log2(3))
    value, baseline, shared = (
        indifferent.query("conditional_mutual_information", layer=0).project("value, baseline, shared").fetchall()[0]
    )
    assert shared == pytest.approx(1)
    assert value == pytest.approx(baseline, rel=0.15)
    assert value > 10 * bits, "every id is rare, so the plain estimate is far too high"


def test_a_router_that_takes_all_experts_says_nothing(partial: Run) -> None:
    for name, column in (("log_odds", "value"), ("reference_difference", "value"), ("mutual_information", "value"),
                         ("mutual_information", "bias"), ("conditional_mutual_information", "value"),
                         ("label_npmi", "value"), ("token_npmi", "value")):  # fmt: skip
        values = partial.query(name, layer=3, include_special=True).project(column).fetchall()
        assert values, name
        assert all(value == pytest.approx(0, abs=1e-9) for (value,) in values), name


def test_differences_sum_to_zero_over_the_experts(partial: Run) -> None:
    rows = partial.query("reference_difference", reference="ko")
    sums = rows.aggregate("layer, label, sum(value)", "layer, label").fetchall()
    assert len(sums) == 2 * 2
    assert all(total == pytest.approx(0, abs=1e-12) for *_, total in sums)


def test_the_reference_is_the_largest_label_unless_given_and_needs_no_place_among_the_labels(partial: Run) -> None:
    rows = partial.query("reference_difference", labels=["ko"], layer=0).project("label, reference").distinct()
    assert rows.fetchall() == [("ko", "en")]
    rows = partial.query("reference_difference", labels=["en"], reference="ko", layer=0)
    swapped = {row[4]: -row[5] for row in rows.fetchall()}
    direct = {row[4]: row[5] for row in partial.query("reference_difference", labels="ko", layer=0).fetchall()}
    assert swapped == pytest.approx(direct)


def test_log_odds_of_two_labels_mirror_each_other(partial: Run) -> None:
    rows = {(row[3], row[4]): row[5] for row in partial.query("log_odds", labels=["en", "ko"], layer=0).fetchall()}
    for expert in range(7):
        assert rows["en", expert] == pytest.approx(-rows["ko", expert])


def test_npmi_has_the_sign_of_lift_and_ranks_the_labels_of_an_expert_as_it_does(partial: Run) -> None:
    keys = "layer, label, expert"
    lifts = {row[:3]: row[3] for row in partial.query("domain_specialization").project(f"{keys}, lift").fetchall()}
    found = {row[:3]: row[3] for row in partial.query("label_npmi").project(f"{keys}, value").fetchall()}
    assert found.keys() == lifts.keys()
    for key, lift in lifts.items():
        if lift is not None:
            assert found[key] == pytest.approx(0, abs=1e-9) if math.isclose(lift, 1) else (found[key] > 0) == (lift > 1)
    for layer, expert in {(layer, expert) for layer, _, expert in lifts}:
        own = [(lifts[layer, label, expert], found[layer, label, expert]) for label in ("en", "ko", "th")]
        assert [value for _, value in sorted(own)] == sorted(value for _, value in own)


def test_a_stronger_prior_pulls_to_zero(partial: Run) -> None:
    weak, strong = (
        {row[3:5]: row[-1] for row in partial.query("log_odds", layer=0, strength=strength).fetchall()}
        for strength in (0.1, 1e6)
    )
    assert all(abs(strong[key]) <= abs(value) + 1e-9 for key, value in weak.items())
    assert max(map(abs, strong.values())) < 1e-3


def test_informations_stay_in_range(partial: Run) -> None:
    for name in ("mutual_information", "conditional_mutual_information"):
        for metric, _, _, value, *_ in partial.query(name).fetchall():
            assert 0 <= value <= (1 if metric.startswith("normalized") else math.log2(3)), metric


def test_labels_with_experts_of_their_own_have_all_information(tmp_path: Path) -> None:
    layers = [Layer(layer=1, n_experts=6, top_k=2)]
    shard = Shard.of_picks(
        layers, documents=[("a", 2), ("b", 2), ("c", 1)], experts={1: [[0, 1], [0, 1], [2, 3], [3, 2], [4, 5]]}
    )
    run = open_run(write_run(tmp_path / "run", layers, [shard]))
    rows = run.query("mutual_information").project("metric, value").fetchall()
    assert rows == [
        ("mutual_information", pytest.approx(math.log2(3))), ("normalized_mutual_information", pytest.approx(1)),
    ]  # fmt: skip


def test_experts_that_follow_the_token_leave_nothing_to_the_label(tmp_path: Path) -> None:
    """The labels differ in their tokens, so the label says much; given the token it says nothing."""
    layers = [Layer(layer=1, n_experts=4, top_k=1)]
    ids = np.array([0, 0, 0, 1, 1, 0, 1, 1, 1, 2])
    shard = Shard.of_picks(layers, documents=[("en", 5), ("ko", 5)], experts={1: ids})
    shard = dataclasses.replace(shard, token_ids=ids)
    run = open_run(write_run(tmp_path / "run", layers, [shard]))
    assert run.query("mutual_information").fetchall()[0][3] > 0.1
    assert (
        run.query("conditional_mutual_information").project("value, baseline").fetchall()
        == [(pytest.approx(0, abs=1e-12), pytest.approx(0, abs=1e-12))] * 2
    )
    ranked = run.query("vocabulary_specialization", min_count=1).project("metric, expert, value, n").fetchall()
    assert ("layer_topk", None, 1, 3) in ranked
    assert ("expert_topk", 3, None, 0) in ranked


def test_a_run_without_token_ids_has_no_rows_about_tokens(tmp_path: Path) -> None:
    layers = [Layer(layer=1, n_experts=4, top_k=1)]
    shard = Shard.of_picks(layers, documents=[("en", 2)], experts={1: [0, 1]})
    shard = dataclasses.replace(shard, token_ids=np.array([None, None], object))
    run = open_run(write_run(tmp_path / "run", layers, [shard]))
    assert run.query("mutual_information").fetchall()
    for name in ("vocabulary_specialization", "conditional_mutual_information", "token_npmi"):
        assert run.query(name, **({"min_count": 1} if name == "token_npmi" else {})).fetchall() == []
