"""Experts chosen together, shared tokens, transitions, repetition, positions: definitions, limits, chance."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.query.relations import paths
from collector.query.warehouse import Run, open_run
from collector.store.tables import Layer
from tests.helpers.query_runs import assert_same, few_examples, keyed, opened, random_runs
from tests.helpers.reference import structure
from tests.helpers.reference.base import decisions
from tests.helpers.synthetic import Shard, random_shard, write_run

LAYERS = (
    Layer(layer=0, n_experts=7, top_k=3),
    Layer(layer=3, n_experts=5, top_k=5),
    Layer(layer=4, n_experts=9, top_k=1),
)


@few_examples
@given(
    random=random_runs(), include_special=st.booleans(), mode=st.sampled_from(["paper", "released"]),
    min_count=st.integers(1, 4), n=st.integers(2, 3), top=st.integers(1, 5), cache=st.none() | st.integers(1, 13),
    warm_up=st.integers(0, 2),
)  # fmt: skip
def test_agrees_with_numpy_on_random_runs(random, include_special, mode, min_count, n, top, cache, warm_up) -> None:
    layers, shards = random
    decided = decisions(layers, shards, include_special=include_special)
    special = {"include_special": include_special}
    with opened(layers, shards) as run:
        assert_same(keyed(run, "coactivation", 5, mode=mode, **special), structure.coactivation(decided, mode))
        assert_same(
            keyed(run, "expert_token_overlap", 5, min_count=min_count, **special),
            structure.expert_token_overlap(decided, min_count),
        )
        assert_same(keyed(run, "layer_transition", 6, **special), structure.layer_transition(decided))
        assert_same(keyed(run, "paths", 4, n=n, top=top, **special), structure.paths(decided, n, top))
        names = {(d.shard, d.doc): f"synthetic#{d.shard}-{d.doc}" for d in decided}
        assert_same(
            keyed(run, "routing_locality", 4, cache=cache, warm_up=warm_up, seed=3, **special),
            structure.routing_locality(decided, names, cache, warm_up, 3),
        )
        assert_same(keyed(run, "repetition", 4, **special), structure.repetition(decided))
        assert_same(keyed(run, "position_profile", 6, **special), structure.position_profile(decided))


@pytest.fixture(scope="module")
def indifferent(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Uniformly random routing of 6,000 tokens in 60 documents."""
    rng = np.random.default_rng(4)
    p = {one.layer: rng.random((6000, one.n_experts)) for one in LAYERS}
    shard = Shard.of_probabilities(LAYERS, documents=[("en", 100)] * 60, probabilities=p)
    return open_run(write_run(tmp_path_factory.mktemp("indifferent") / "run", LAYERS, [shard]))


@pytest.fixture(scope="module")
def partial(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two shards; routing that depends on the label."""
    rng = np.random.default_rng(5)
    shards = [random_shard(rng, LAYERS, [("en", 90), ("ko", 40), ("th", 1)], vocabulary=9) for _ in range(2)]
    return open_run(write_run(tmp_path_factory.mktemp("partial") / "run", LAYERS, shards))


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("coactivation", {}),
        ("coactivation", {"mode": "released"}),
        ("layer_transition", {}),
        ("repetition", {}),
    ],
)
def test_chance_gives_the_baselines(indifferent: Run, name: str, params: dict[str, str]) -> None:
    rows = indifferent.query(name, **params).aggregate(
        "metric, layer, avg(value) as value, avg(baseline) as baseline, max(abs(value - baseline)) as worst",
        "metric, layer",
    )
    for metric, layer, value, baseline, worst in rows.fetchall():
        assert value == pytest.approx(baseline, rel=0.05, abs=0.002), (metric, layer)
        assert worst < 0.08, (metric, layer)


def test_random_sets_of_ids_overlap_by_the_baseline(tmp_path: Path) -> None:
    """With gaps between the ids, and more of them than one string of bits holds."""
    rng = np.random.default_rng(8)
    sets = [np.sort(rng.permutation(6000)[:size]) * 5 + 3 for size in (3000, 2000, 6000)]
    experts = np.repeat([0, 1, 2], [len(each) for each in sets])
    layers = [Layer(layer=0, n_experts=4, top_k=1)]
    shard = Shard.of_picks(layers, documents=[("en", len(experts))], experts={0: experts})
    shard = dataclasses.replace(shard, token_ids=np.concatenate(sets))
    run = open_run(write_run(tmp_path / "run", layers, [shard]))
    rows = run.query("expert_token_overlap").project("expert, other_expert, value, baseline, n").fetchall()
    assert [row[:2] for row in rows] == [(0, 1), (0, 2), (1, 2)]
    for i, j, value, baseline, n in rows:
        assert value == pytest.approx(baseline, rel=0.05)
        assert value == len(np.intersect1d(sets[i], sets[j])) / n


def test_early_positions_of_random_routing_are_like_all_others(indifferent: Run) -> None:
    rows = indifferent.query("position_profile").project("layer, first_position, last_position, value, baseline, n")
    found = rows.fetchall()
    bounds = [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63), (64, 127)]
    assert sorted({row[1:3] for row in found}) == bounds
    for layer, first, _, value, baseline, n in found:
        assert abs(value - baseline) < 5 * (baseline * (1 - baseline) / n) ** 0.5 + 1e-9, (layer, first)


def test_the_other_picks_of_a_token_are_k_less_one(partial: Run) -> None:
    sums = partial.query("coactivation").aggregate("layer, expert, sum(value)", "layer, expert").fetchall()
    assert len(sums) == 7 + 5
    assert all(total == pytest.approx({0: 2, 3: 4}[layer]) for layer, _, total in sums)


def test_counts_of_coactivation_are_symmetric(partial: Run) -> None:
    for mode in ("paper", "released"):
        counts = {row[2:5]: row[8] for row in partial.query("coactivation", mode=mode).fetchall()}
        assert all(counts[layer, j, i] == count for (layer, i, j), count in counts.items())


def test_neighbours_of_equal_weight_keep_the_models_order(tmp_path: Path) -> None:
    """With a layer of smaller k beside it, whose missing weights come last."""
    layers = [Layer(layer=0, n_experts=40, top_k=30), Layer(layer=1, n_experts=5, top_k=3)]
    rng = np.random.default_rng(0)
    experts = {
        one.layer: rng.permuted(np.tile(range(one.n_experts), (20, 1)), axis=1)[:, : one.top_k] for one in layers
    }
    weights = {one.layer: rng.choice([0.25, 0.5], (20, one.top_k)) for one in layers}
    shard = Shard.of_picks(layers, documents=[("en", 20)], experts=experts, weights=weights)
    run = open_run(write_run(tmp_path / "run", layers, [shard]))
    expected = structure.coactivation(decisions(layers, [shard], include_special=False), "released")
    assert_same(keyed(run, "coactivation", 5, mode="released"), expected)


def test_another_mode_is_refused(partial: Run) -> None:
    with pytest.raises(Exception, match="mode takes paper or released"):
        partial.query("coactivation", mode="pairs").fetchall()


def test_transitions_sum_to_one_and_a_layer_finds_its_successor(partial: Run) -> None:
    sums = partial.query("layer_transition").aggregate("layer, next_layer, expert, sum(value)", "all").fetchall()
    assert {row[:2] for row in sums} == {(0, 3), (3, 4)}
    assert all(total == pytest.approx(1) for *_, total in sums)
    one = partial.query("layer_transition", layer=3).fetchall()
    assert one == [row for row in partial.query("layer_transition").fetchall() if row[2] == 3]
    assert partial.query("layer_transition", layer=4).fetchall() == []


def test_paths_are_the_same_where_their_numbers_would_not_fit(partial: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = partial.query("paths").fetchall()
    assert {row[2] for row in found} == {0}
    assert partial.query("paths", layer=3, n=2).fetchall() == [
        row for row in partial.query("paths", n=2).fetchall() if row[2] == 3
    ]
    monkeypatch.setattr(paths, "_LARGEST", 1)
    assert partial.query("paths").fetchall() == found


def test_paths_of_independent_layers_are_those_of_the_chain_and_say_nothing_of_ids(indifferent: Run) -> None:
    rows = indifferent.query("paths", top=1000).project("metric, value, baseline, n").fetchall()
    assert len(rows) == 7 * 5 * 9 + 3
    for metric, value, baseline, n in rows:
        if metric == "path_share":
            assert abs(value - baseline) < 5 * (baseline / n) ** 0.5
        else:
            assert value == pytest.approx(baseline, rel=0.1), metric


def test_a_cache_that_holds_all_experts_misses_new_ones_alone(partial: Run) -> None:
    rows = partial.query("routing_locality", cache=9, warm_up=0).project("value + new").fetchall()
    assert {round(total, 12) for (total,) in rows} == {1}
    where = {"layer": 0, "seed": 1}
    small, large = (
        dict(partial.query("routing_locality", cache=cache, **where).project("label, value").fetchall())
        for cache in (1, 5)
    )
    assert all(small[label] <= large[label] for label in small)


def test_the_order_of_tokens_decides_how_many_a_cache_holds(tmp_path: Path) -> None:
    """Each expert ten times in a row; the random order of a document is the same whatever else is asked for."""
    layers = [Layer(layer=0, n_experts=100, top_k=1)]
    shard = Shard.of_picks(layers, documents=[("en", 100), ("ko", 100)], experts={0: np.repeat(np.arange(20), 10)})
    run = open_run(write_run(tmp_path / "run", layers, [shard]))
    rows = run.query("routing_locality").fetchall()
    assert [row[4] for row in rows] == [pytest.approx(90 / 99)] * 2
    assert all(0.05 < row[5] < 0.3 for row in rows)
    assert run.query("routing_locality", labels="ko").fetchall() == rows[1:]
    assert run.query("routing_locality", seed=1).fetchall() != rows


def test_a_cache_sees_the_tokens_of_all_groups(tmp_path: Path) -> None:
    layers = [Layer(layer=0, n_experts=3, top_k=1)]
    shard = Shard.of_picks(layers, documents=[("en", 4)], experts={0: [0, 1, 0, 2]})
    folder = write_run(tmp_path / "run", layers, [shard])
    rows = open_run(folder, by="position").query("routing_locality").project("label, value, n")
    assert rows.fetchall() == [("000001", 0, 1), ("000002-000003", 0.5, 2)]
    assert open_run(folder, by="position").query("routing_locality", labels="000002-000003").fetchall()[0][4] == 0.5


def test_a_router_that_takes_all_experts_always_repeats_them(partial: Run) -> None:
    rows = partial.query("repetition", layer=3).project("metric, label, value, baseline").fetchall()
    assert {row[2:] for row in rows if row[0] == "any_shared"} == {(1, 1)}
    assert {row[2:] for row in rows if row[0] == "mean_shared"} == {(5, 5)}
    assert {row[1] for row in rows} == {"en", "ko"}, "a document of one token has no pair"


def test_overlap_of_tokens_is_bounded_and_falls_with_the_count_asked_for(partial: Run) -> None:
    sizes = {}
    for min_count in (1, 8):
        rows = partial.query("expert_token_overlap", min_count=min_count).fetchall()
        assert all(0 <= row[5] <= 1 and row[3] < row[4] for row in rows)
        sizes[min_count] = {row[2:4]: row[8] for row in rows}
    assert all(size <= sizes[1][key] for key, size in sizes[8].items())
    everything = partial.query("expert_token_overlap", layer=3).project("value, baseline").distinct().fetchall()
    assert everything == [(1, 1)]


def test_tokens_on_both_sides_of_a_special_one_are_no_pair(tmp_path: Path) -> None:
    layers = [Layer(layer=0, n_experts=3, top_k=1)]
    shard = Shard.of_picks(
        layers, documents=[("en", 3), ("en", 1)], experts={0: [1, 2, 1, 1]}, is_special=[False, True, False, False]
    )
    run = open_run(write_run(tmp_path / "run", layers, [shard]))
    assert run.query("repetition").fetchall() == []
    found = run.query("repetition", include_special=True).project("metric, value, n").fetchall()
    assert found == [("any_shared", 0, 2), ("mean_shared", 0, 2), ("top1_same", 0, 2)]
