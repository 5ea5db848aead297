"""Load balance: definitions, limits, chance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.query.warehouse import Run, open_run
from collector.store.tables import Layer
from tests.helpers.query_runs import STORED, assert_same, few_examples, keyed, opened, random_runs
from tests.helpers.reference import frequency, load
from tests.helpers.reference.base import decisions
from tests.helpers.synthetic import Shard, write_run

LOGITS = ("logits",)
"""Stored without probabilities, which are then computed in double precision."""
LAYERS = (Layer(layer=0, n_experts=7, top_k=2), Layer(layer=3, n_experts=5, top_k=5))


@few_examples
@given(
    random=random_runs(), include_special=st.booleans(), pooled=st.booleans(), store=STORED,
    threshold=st.sampled_from([0.001, 0.2, 0.5]), m=st.none() | st.integers(1, 14), mass=st.sampled_from([0.5, 0.9, 1]),
)  # fmt: skip
def test_agrees_with_numpy_on_random_runs(random, include_special, pooled, store, threshold, m, mass) -> None:
    layers, shards = random
    decided = decisions(layers, shards, include_special=include_special)
    with opened(layers, shards, store=store) as run:
        assert_same(
            keyed(run, "load_balance", 4, include_special=include_special, pooled=pooled, threshold=threshold, m=m),
            load.load_balance(decided, pooled=pooled, threshold=threshold, m=m, probabilities=bool(store)),
            rel=1e-8 if store != LOGITS else 1e-5,
        )
        stats = frequency.router_stats(decided, pooled=pooled, stored=store)
        found = keyed(run, "router_stats", 4, include_special=include_special, pooled=pooled)
        assert_same({key: row for key, row in found.items() if store != LOGITS or "probability" not in key[0]}, stats)
        assert_same(
            keyed(run, "dynamic_k", 4, include_special=include_special, pooled=pooled, mass=mass),
            frequency.dynamic_k(decided, pooled=pooled, mass=mass, probabilities=bool(store)),
        )
        assert_same(
            keyed(run, "expert_load", 4, include_special=include_special, threshold=threshold),
            load.expert_load(decided, threshold=threshold),
        )


def values(run: Run, **params: object) -> dict[tuple[str, int], tuple[float, float]]:
    rows = run.query("load_balance", pooled=True, **params).project("metric, layer, value, baseline").fetchall()
    return {(metric, layer): (value, baseline) for metric, layer, value, baseline in rows}


@pytest.fixture(scope="module")
def indifferent(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Uniformly random routing of 8,000 tokens in documents of 4."""
    rng = np.random.default_rng(4)
    p = {one.layer: rng.random((8000, one.n_experts)) for one in LAYERS}
    p = {layer: p_te / p_te.sum(1, keepdims=True) for layer, p_te in p.items()}
    shard = Shard.of_probabilities(LAYERS, documents=[("en", 4)] * 2000, probabilities=p)
    folder = tmp_path_factory.mktemp("indifferent") / "run"
    return open_run(write_run(folder, LAYERS, [shard], store=("probabilities",)))


def test_chance_gives_the_baselines(indifferent: Run) -> None:
    found = values(indifferent)
    assert {metric for metric, _ in found} == {
        "gini", "coefficient_of_variation", "max_over_mean", "mean_over_max", "dead_share", "coverage",
        "load_balance_loss", "document_union",
    }  # fmt: skip
    for key, (value, baseline) in found.items():
        assert value == pytest.approx(baseline, rel=0.06, abs=0.06), key
    assert found["document_union", 0][1] == pytest.approx(1 - (5 / 7) ** 4)
    # what the header says about random routing in a finite sample
    assert 0.5 < found["coefficient_of_variation", 0][0] / (5 / (2 * 8000)) ** 0.5 < 1.7


def test_a_router_that_takes_all_experts_is_balanced(indifferent: Run) -> None:
    found = values(indifferent)
    for metric in ("gini", "coefficient_of_variation", "max_over_mean", "coverage", "document_union"):
        value, baseline = found[metric, 3]
        assert value == pytest.approx(baseline), metric


def test_one_expert_for_everything_is_the_worst_load(tmp_path: Path) -> None:
    layers = [Layer(layer=0, n_experts=6, top_k=1)]
    p_te = np.tile(np.eye(6)[3], (20, 1))
    shard = Shard.of_probabilities(layers, documents=[("en", 12), ("ko", 8)], probabilities={0: p_te})
    run = open_run(write_run(tmp_path / "run", layers, [shard], store=("probabilities",)))
    found = {metric: value for (metric, _), (value, _) in values(run).items()}
    assert found == pytest.approx({
        "gini": 5 / 6, "coefficient_of_variation": 5**0.5, "max_over_mean": 6, "mean_over_max": 1 / 6,
        "dead_share": 5 / 6, "coverage": 1, "load_balance_loss": 6, "document_union": 1 / 6,
    })  # fmt: skip


def test_labels_that_are_uneven_each_can_be_even_together(tmp_path: Path) -> None:
    layers = [Layer(layer=0, n_experts=4, top_k=2)]
    shard = Shard.of_picks(layers, documents=[("en", 1), ("ko", 1)], experts={0: [[0, 1], [2, 3]]})
    run = open_run(write_run(tmp_path / "run", layers, [shard]))
    rows = run.query("load_balance").filter("metric = 'gini'").project("label, value").fetchall()
    assert rows == [("en", 0.5), ("ko", 0.5)]
    assert values(run)["gini", 0] == (0, 0)


def test_without_stored_probabilities_there_is_no_loss(tmp_path: Path) -> None:
    layers = [Layer(layer=0, n_experts=4, top_k=2)]
    shard = Shard.of_picks(layers, documents=[("en", 1)], experts={0: [[0, 1]]})
    run = open_run(write_run(tmp_path / "run", layers, [shard]))
    assert "load_balance_loss" not in {row[0] for row in run.query("load_balance").fetchall()}


@few_examples
@given(
    random=random_runs(), include_special=st.booleans(), by_layer=st.booleans(), gpus=st.integers(1, 5),
    more=st.none() | st.integers(0, 3),
)  # fmt: skip
def test_plans_serve_other_labels_as_in_numpy(random, include_special, by_layer, gpus, more) -> None:
    layers, shards = random
    most = -(-max(one.n_experts for one in layers) // gpus)
    size = {"gpus": gpus, "replicas": None if more is None else (most + more) * gpus}
    decided = decisions(layers, shards, include_special=include_special)
    with opened(layers, shards) as run:
        found = run.query("plan_transfer", **size, by_layer=by_layer, include_special=include_special).fetchall()
    expected = load.plan_transfer(decided, halves(shards), **size, by_layer=by_layer)
    if not by_layer:  # layers of one stack see the same tokens, so their mean is n
        assert all(values[2] == int(values[2]) for values in expected.values())
    assert_same({row[:5]: row[5:] for row in found}, expected)


def halves(shards: list[Shard]) -> dict[tuple[int, int], bool]:
    """Of each label's documents every other one is in the first half."""
    before: dict[str, int] = {}
    found = {}
    for number, shard in enumerate(shards):
        for doc, (label, _) in enumerate(shard.documents):
            found[number, doc] = before.get(label, 0) % 2 == 0
            before[label] = before.get(label, 0) + 1
    return found


def test_a_plan_that_gpus_cannot_hold_is_refused(indifferent: Run) -> None:
    with pytest.raises(
        ValueError, match="9 replicas in all cannot hold 7 experts evenly on 4 gpus: take a multiple of 4"
    ):
        indifferent.query("plan_transfer", gpus=4, replicas=9)
    with pytest.raises(ValueError, match="gpus must be at least 1, got 0"):
        indifferent.query("plan_transfer", gpus=0)
