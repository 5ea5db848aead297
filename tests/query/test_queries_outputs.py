"""What experts put out and how well the model predicts: against numpy, and where a run did not record it."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.query import inference
from collector.query.comparison import open_runs
from collector.query.warehouse import open_run, views_sql
from collector.store.run_directory import RunDirectory
from collector.store.tables import Layer
from tests.helpers.query_runs import assert_same, assert_same_rows, few_examples, keyed, opened, random_runs
from tests.helpers.reference import outputs
from tests.helpers.synthetic import Shard, random_shard, write_run

LAYERS = (Layer(layer=1, n_experts=6, top_k=2, has_capacity=True), Layer(layer=2, n_experts=5, top_k=3))
FLOAT32 = 1e-5
"""Sums by document are recorded in float32."""
DOCUMENTS = [("en", 9), ("ko", 12), ("en", 4), ("ko", 3)]


@few_examples
@given(random=random_runs(), include_special=st.booleans(), pooled=st.booleans())
def test_agrees_with_numpy_on_random_runs(random, include_special, pooled) -> None:
    layers, shards = random
    special = {"include_special": include_special}
    with opened(layers, shards) as run:
        assert_same(
            keyed(run, "expert_contribution", 5, pooled=pooled, **special),
            outputs.expert_contribution(layers, shards, pooled=pooled, **special),
            rel=FLOAT32,
        )
        assert_same(
            keyed(run, "contribution_overlap", 5, **special),
            outputs.contribution_overlap(layers, shards, **special),
            rel=FLOAT32,
        )
        assert_same(
            keyed(run, "contribution_specialization", 5, **special),
            outputs.contribution_specialization(layers, shards, **special),
            rel=FLOAT32,
        )
        assert_same(keyed(run, "loss", 3, **special), outputs.loss(layers, shards, **special))


@few_examples
@given(
    random=random_runs(), include_special=st.booleans(), percentile=st.sampled_from([0.0, 50.0, 99.5]),
    share=st.sampled_from([0.1, 0.9]), depth=st.sampled_from([0.5, 1.0]), top=st.integers(1, 9),
)  # fmt: skip
def test_super_experts_agree_with_numpy(random, **params) -> None:
    layers, shards = random
    with opened(layers, shards) as run:
        rows = {row[:4]: row[4:] for row in run.query("super_experts", **params).fetchall()}
    assert_same(rows, outputs.super_experts(layers, shards, **params))


def shards() -> list[Shard]:
    return [random_shard(np.random.default_rng(seed), LAYERS, DOCUMENTS) for seed in (1, 2)]


@few_examples
@given(random=random_runs(), include_special=st.booleans())
def test_compute_agrees_with_numpy(random, **params) -> None:
    layers, shards = random
    with opened(layers, shards) as run:
        assert_same(keyed(run, "compute", 4, **params), outputs.compute(layers, shards, **params))


@few_examples
@given(
    random=random_runs(), measure=st.sampled_from(["cka", "cosine", "angular"]),
    over=st.sampled_from(["sampled", "either", "both", "usual"]),
)  # fmt: skip
def test_expert_similarity_agrees_with_numpy(random, **params) -> None:
    layers, shards = random
    with opened(layers, shards) as run:
        assert_same(keyed(run, "expert_similarity", 5, **params), outputs.expert_similarity(shards, **params))


@few_examples
@given(random=random_runs(), pooled=st.booleans(), n=st.integers(1, 4))
def test_what_experts_write_agrees_with_numpy(random, pooled, n) -> None:
    layers, shards = random
    with opened(layers, shards) as run:
        assert_same(keyed(run, "output_vocabulary", 5, n=n), outputs.output_vocabulary(shards, n))
        assert_same(keyed(run, "output_specialization", 4), outputs.output_specialization(shards))
        assert_same(
            keyed(run, "direct_attribution", 5, pooled=pooled), outputs.direct_attribution(shards, pooled=pooled)
        )


def test_pairs_of_one_expert_are_those_of_all(folder: Path) -> None:
    run = open_run(folder)
    of_one = run.query("expert_similarity", expert=2).fetchall()
    assert_same_rows(of_one, [row for row in run.query("expert_similarity").fetchall() if row[3] == 2])
    for name, value in (("measure", "CKA"), ("over", "none")):
        with pytest.raises(duckdb.Error, match=f"{name} takes"):
            run.query("expert_similarity", **{name: value}).fetchall()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", LAYERS, shards())


def test_a_layer_of_super_experts_is_compared_with_all_layers(folder: Path) -> None:
    run = open_run(folder)
    everywhere = run.query("super_experts", top=100).fetchall()
    of_one = run.query("super_experts", top=100, layer=2).fetchall()
    assert of_one == [row for row in everywhere if row[2] == 2]


def test_shares_of_a_layer_add_up(folder: Path) -> None:
    """The contributions of random picks do not add up to 1; they add up to what was recorded."""
    rows = open_run(folder).query("expert_contribution", layer=2, pooled=True, include_special=True)
    ((total,),) = rows.filter("metric = 'contribution'").aggregate("sum(value)").fetchall()
    recorded = [(shard.effects[2]["contributions"].sum(dtype=float), len(shard.labels)) for shard in shards()]
    assert total == pytest.approx(sum(c for c, _ in recorded) / sum(tokens for _, tokens in recorded))


def test_what_a_run_did_not_record_is_an_error_that_says_so(folder: Path, tmp_path: Path) -> None:
    plain = open_run(write_run(tmp_path / "plain", LAYERS, shards(), record=()))
    for name in ("expert_contribution", "contribution_overlap", "contribution_specialization", "super_experts"):
        with pytest.raises(ValueError, match=rf"{name} reads \w+_outputs, which needs what --record outputs keeps"):
            plain.query(name)
    with pytest.raises(ValueError, match="loss reads label_losses, which needs what --record loss keeps; this run was"):
        plain.query("loss")
    with pytest.raises(ValueError, match="expert_similarity reads expert_pairs, which needs what --record similarity"):
        plain.query("expert_similarity")
    with pytest.raises(ValueError, match="needs what --record loss keeps"):
        inference.intervals(plain, "loss")
    assert plain.query("expert_load").fetchall()
    unweighed = open_run(write_run(tmp_path / "unweighed", LAYERS, shards(), weights=None))
    with pytest.raises(
        ValueError, match=r"weight_similarity reads weights, which `collector weights .*unweighed` makes"
    ):
        unweighed.query("weight_similarity")
    older = open_run(write_run(tmp_path / "older", LAYERS, shards(), compute=False))
    with pytest.raises(ValueError, match="compute reads components, which this run does not have"):
        older.query("compute")
    assert "document_outputs" not in views_sql(RunDirectory(tmp_path / "plain"))
    assert "document_outputs" in views_sql(RunDirectory(folder))
    both = open_runs(folder, tmp_path / "plain")
    with pytest.raises(ValueError, match="expert_contribution"):
        both.query("expert_contribution")


def test_what_is_summed_by_document_has_no_groups_of_tokens(folder: Path) -> None:
    run = open_run(folder, by="position")
    with pytest.raises(ValueError, match="which sums over whole documents; --by position groups single tokens"):
        run.query("expert_contribution")
    losses = run.query("loss").filter("metric = 'nats_per_token'").project("n").fetchall()
    predicted = sum((~np.isnan(shard.losses) & ~shard.is_special).sum() for shard in shards())
    assert sum(n for (n,) in losses) == predicted
    assert run.query("loss").filter("metric = 'bits_per_character' and value is not null").fetchall() == []
    by_length = open_run(folder, by="length")
    assert by_length.query("expert_contribution").fetchall()


def test_an_interval_of_all_labels_together_counts_the_label_with_the_fewest_documents(folder: Path) -> None:
    table = inference.intervals(open_run(folder), "expert_contribution", pooled=True, layer=2, resamples=50)
    assert set(table["documents"].to_pylist()) == {4}
    assert set(table["label"].to_pylist()) == {None}
    shares = [row for row in table.to_pylist() if row["metric"] == "contribution"]
    assert all(row["low"] < row["value"] < row["high"] for row in shares)
