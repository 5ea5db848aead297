"""Fertility, one document token by token, one expert's profile, parallel sentences."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.query.warehouse import Run, open_run
from collector.store.tables import Layer
from tests.helpers.query_runs import STORED, assert_same, few_examples, keyed, opened, random_runs
from tests.helpers.reference import texts
from tests.helpers.reference.base import decisions
from tests.helpers.synthetic import Shard, random_shard, write_run

LAYERS = (Layer(layer=0, n_experts=7, top_k=2), Layer(layer=3, n_experts=5, top_k=5))


@few_examples
@given(
    random=random_runs(), include_special=st.booleans(), store=STORED, expert=st.integers(0, 5),
    n=st.integers(1, 8), width=st.integers(0, 4), every=st.integers(1, 3), data=st.data(),
)  # fmt: skip
def test_agrees_with_numpy_on_random_runs(random, include_special, store, expert, n, width, every, data) -> None:
    layers, shards = random
    decided = decisions(layers, shards, include_special=include_special)
    shard = data.draw(st.integers(0, len(shards) - 1))
    doc = data.draw(st.integers(0, len(shards[shard].documents) - 1))
    special = {"include_special": include_special}
    with opened(layers, shards, store=store) as run:
        assert_same(keyed(run, "fertility", 2, **special), texts.fertility(shards, include_special=include_special))
        assert_same(keyed(run, "nearest_documents", 4, n=n, **special), texts.nearest_documents(decided, n))
        name = f"synthetic#{shard}-{doc}"
        one = keyed(run, "nearest_documents", 4, n=n, document=name, **special)
        assert_same(one, texts.nearest_documents(decided, n, name))
        trace = texts.token_trace(decided, shard, doc, logits="logits" in store)
        assert_same(keyed(run, "token_trace", 4, shard=shard, doc=doc, **special), trace)
        assert_same(keyed(run, "token_trace", 4, document=f"synthetic#{shard}-{doc}", **special), trace)
        assert_same(
            keyed(run, "expert_profile", 5, expert=expert, n=n, width=width, every=every, **special),
            texts.expert_profile([d for d in decided if d.shard % every == 0], expert, n, width),
        )
        assert_same(
            keyed(run, "routing_divergence", 5, **special),
            texts.routing_divergence(decided, probabilities=bool(store)),
            rel=1e-5 if "logits" in store else 1e-8,
        )


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three labels, of which two have the very same routing; the same sentence ids in all."""
    rng = np.random.default_rng(6)
    one = random_shard(rng, LAYERS, [("en", 12), ("en", 9), ("en", 10)])
    twin = dataclasses.replace(one, documents=[("twin", length) for _, length in one.documents])
    other = random_shard(rng, LAYERS, [("zz", 7), ("zz", 20), ("zz", 11)])
    shards = [dataclasses.replace(each, parallel_ids=["s0", "s1", "s2"]) for each in (one, twin, other)]
    folder = tmp_path_factory.mktemp("parallel") / "run"
    return open_run(write_run(folder, LAYERS, shards, store=("probabilities",)))


def test_divergence_is_symmetric_bounded_and_zero_for_the_same_routing(parallel: Run) -> None:
    found = {row[2:5]: row[5:] for row in parallel.query("routing_divergence").fetchall()}
    assert len(found) == 2 * 3 * 2
    for (layer, a, b), (value, baseline, n) in found.items():
        assert found[layer, b, a] == (value, baseline, n)
        assert n == 3
        assert 0 <= value <= 1
        if "zz" not in (a, b):
            assert value == pytest.approx(0, abs=1e-9)
        else:
            assert value > 0.01, "full probabilities differ even where all experts are chosen"


def test_experts_of_their_own_diverge_by_one_and_say_that_they_are_of_the_chosen_only(tmp_path: Path) -> None:
    layers = [Layer(layer=0, n_experts=4, top_k=2), Layer(layer=1, n_experts=1, top_k=1)]
    shard = Shard.of_picks(
        layers, documents=[("en", 2), ("ko", 1), ("ko", 1)],
        experts={0: [[0, 1], [0, 1], [2, 3], [0, 1]], 1: [0, 0, 0, 0]},
    )  # fmt: skip
    shard = dataclasses.replace(shard, parallel_ids=["s0", "s0", None])
    run = open_run(write_run(tmp_path / "run", layers, [shard]))
    rows = run.query("routing_divergence").project("metric, layer, label_a, label_b, value, n").fetchall()
    assert rows == [
        ("topk_routing_divergence", 0, "en", "ko", pytest.approx(1), 1),
        ("topk_routing_divergence", 0, "ko", "en", pytest.approx(1), 1),
        ("topk_routing_divergence", 1, "en", "ko", 0, 1),
        ("topk_routing_divergence", 1, "ko", "en", 0, 1),
    ]


def test_a_trace_is_of_one_document_the_first_unless_asked(parallel: Run) -> None:
    assert {row[0] for row in parallel.query("token_trace").fetchall()} == {"synthetic#0-0"}
    rows = parallel.query("token_trace", labels=["zz"], include_special=True).fetchall()
    assert {row[0] for row in rows} == {"synthetic#2-0"}
    assert len(rows) == 7 * 2
    assert parallel.query("token_trace", document="synthetic#2-0", labels=["en"]).fetchall() == []


def test_a_trace_spells_the_ids_that_the_vocabulary_has(tmp_path: Path) -> None:
    layers = [Layer(layer=0, n_experts=300, top_k=2)]
    shard = Shard.of_picks(layers, documents=[("en", 2)], experts={0: [[299, 4], [0, 1]]})
    shard = dataclasses.replace(shard, token_ids=np.array([7, 4_000_000_000]))
    run = open_run(write_run(tmp_path / "run", layers, [shard]))
    rows = run.query("token_trace").project("token_id, token, experts").fetchall()
    assert rows == [(7, "token 7", [299, 4]), (4_000_000_000, None, [0, 1])]
    items = run.query("expert_profile", expert=299).project("aspect, item").fetchall()
    assert items == [
        ("context", "⟦token 7⟧"), ("expert", "4"), ("label", "en"), ("position", "0"), ("token", "token 7"),
    ]  # fmt: skip


def test_a_trace_without_token_ids_still_has_the_decisions(tmp_path: Path) -> None:
    layers = [Layer(layer=0, n_experts=3, top_k=1)]
    shard = Shard.of_picks(layers, documents=[("en", 2)], experts={0: [0, 1]})
    shard = dataclasses.replace(shard, token_ids=np.array([None, None], object))
    run = open_run(write_run(tmp_path / "run", layers, [shard]))
    assert run.query("token_trace").project("token_id, token, expert").fetchall() == [(None, None, 0), (None, None, 1)]
    assert not {"token", "context"} & {row[0] for row in run.query("expert_profile").fetchall()}


def test_a_profile_knows_experts_above_255_and_layers_without_the_expert(parallel: Run) -> None:
    layers_with_items = {row[2] for row in parallel.query("expert_profile", expert=6).fetchall()}
    assert layers_with_items == {0}
    assert parallel.query("expert_profile", expert=300).fetchall() == []


def test_a_profile_of_an_expert_that_all_tokens_have_shows_no_difference(parallel: Run) -> None:
    rows = parallel.query("expert_profile", expert=2, layer=3).filter("aspect != 'context'")
    rows = rows.project("aspect, value, baseline").fetchall()
    assert {row[0] for row in rows} == {"token", "label", "position", "expert"}
    assert {row[1:] for row in rows} == {(1, 1)}


def test_fertility_of_an_encoder_decoder_model_counts_what_the_encoder_reads(tmp_path: Path) -> None:
    layers = [Layer(stack=stack, layer=1, n_experts=3, top_k=1) for stack in ("encoder", "decoder")]
    rng = np.random.default_rng(0)
    shard = random_shard(rng, layers, [("en", 5), ("en", 3)], special=0)
    run = open_run(write_run(tmp_path / "run", layers, [shard]))
    assert run.query("fertility").project("metric, value, tokens, characters").fetchall() == [
        ("characters_per_token", 4, 8, 32), ("documents", 2, 8, 32), ("tokens_per_character", 0.25, 8, 32),
        ("tokens_per_document", 4, 8, 32), ("truncated_share", 0, 8, 32),
    ]  # fmt: skip
