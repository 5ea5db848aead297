"""Counts per document: as views and as arrays, against a walk over every decision."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.query.document_counts import STATISTICS, DocumentCounts, document_counts
from collector.query.warehouse import open_run
from collector.store.tables import Layer
from tests.helpers.query_runs import few_examples, opened, random_runs
from tests.helpers.reference.base import Decision, by_router, decisions, grouped
from tests.helpers.synthetic import Shard, write_run

TINY = [Layer(layer=2, n_experts=4, top_k=2, has_capacity=True)]


def tiny_shard() -> Shard:
    """A document of two tokens, the second of which is special, and one of one token."""
    return Shard.of_picks(
        TINY, documents=[("ko", 2), ("en", 1)], experts={2: [[3, 1], [1, 0], [2, 3]]}, is_special=[0, 1, 0],
        weights={2: [[0.25, 0.25], [0.125, 0.5], [0.75, 0.25]]}, dropped={2: [[1, 1], [0, 0], [0, 1]]},
    )  # fmt: skip


def test_counts_worked_out_by_hand(tmp_path) -> None:
    run = open_run(write_run(tmp_path / "run", TINY, [tiny_shard()]))
    rows = run.sql(
        "select doc, label, is_special, tokens, dropped_picks, dropped_tokens, experts, picks, top1, weight_sums "
        "from document_counts order by doc, is_special"
    ).fetchall()
    assert rows == [
        (0, "ko", False, 1, 2, 1, [1, 3], [1, 1], [0, 1], [0.25, 0.25]),
        (0, "ko", True, 1, 0, 0, [0, 1], [1, 1], [1, 0], [0.5, 0.125]),
        (1, "en", False, 1, 1, 1, [2, 3], [1, 1], [1, 0], [0.75, 0.25]),
    ]
    cells = run.sql("select expert, tokens, picks, top1, weight_sum from document_assignments where doc = 1")
    assert sorted(cells.fetchall()) == [(2, 1, 1, 1, 0.75), (3, 1, 1, 0, 0.25)]


def test_arrays_worked_out_by_hand(tmp_path) -> None:
    run = open_run(write_run(tmp_path / "run", TINY, [tiny_shard()]))
    (counts,) = document_counts(run, include_special=True)
    assert (counts.stack, counts.layer, counts.n_experts, counts.top_k) == ("decoder", 2, 4, 2)
    assert counts.labels == ("en", "ko")
    assert counts.label_D.tolist() == [1, 0]
    assert (counts.shard_D.tolist(), counts.doc_D.tolist()) == ([0, 0], [0, 1])
    assert counts.tokens_D.tolist() == [2, 1]
    assert counts.picks_DE.tolist() == [[1, 2, 0, 1], [0, 0, 1, 1]]
    assert counts.top1_DE.tolist() == [[1, 0, 0, 1], [0, 0, 1, 0]]
    assert counts.weight_sum_DE.tolist() == [[0.5, 0.375, 0, 0.25], [0, 0, 0.75, 0.25]]
    statistics = dict(zip(STATISTICS, counts.statistics_DM.T.tolist(), strict=True))
    # H(1/2, 1/2) + H(1/5, 4/5) = ln 2 + 0.500402; H(3/4, 1/4) = 0.562335; nothing else is recorded but drops
    assert statistics.pop("weight_entropy") == pytest.approx([1.193550, 0.562335])
    zeros = {name: [0, 0] for name in ("router_entropy", "topk_mass", "margin")}
    assert statistics == zeros | {"dropped_picks": [2, 1], "dropped_tokens": [1, 1]}
    types = counts.picks_DE.dtype, counts.top1_DE.dtype, counts.weight_sum_DE.dtype, counts.label_D.dtype
    assert types == (np.uint32, np.uint32, np.float32, np.int64)


def assert_counts(counts: DocumentCounts, found: list[Decision]) -> None:
    """The arrays hold what a walk over the decisions finds, documents in the order of the run."""
    documents = sorted(grouped(found, lambda one: (one.shard, one.doc)).items())
    assert list(zip(counts.shard_D.tolist(), counts.doc_D.tolist(), strict=True)) == [key for key, _ in documents]
    assert [counts.labels[i] for i in counts.label_D] == [members[0].label for _, members in documents]
    assert counts.labels == tuple(sorted({one.label for one in found}))
    assert counts.tokens_D.tolist() == [len(members) for _, members in documents]
    for d, (_, members) in enumerate(documents):
        picks, weights = np.zeros(counts.n_experts), np.zeros(counts.n_experts)
        for one in members:
            np.add.at(picks, one.experts, 1)
            np.add.at(weights, one.experts, one.weights)
        for name, recorded in (("router_entropy", "entropy"), ("topk_mass", "topk_mass"), ("margin", "margin")):
            summed = sum(one.statistics[recorded] for one in members)
            np.testing.assert_allclose(counts.statistics_DM[d, STATISTICS.index(name)], summed, rtol=1e-5)
        drops = [sum(one.dropped) for one in members]
        assert counts.statistics_DM[d, STATISTICS.index("dropped_picks")] == sum(drops)
        assert counts.statistics_DM[d, STATISTICS.index("dropped_tokens")] == np.count_nonzero(drops)
        top1 = np.bincount([one.top1 for one in members], minlength=counts.n_experts)
        np.testing.assert_array_equal(counts.picks_DE[d], picks)
        np.testing.assert_array_equal(counts.top1_DE[d], top1)
        np.testing.assert_allclose(counts.weight_sum_DE[d], weights, rtol=1e-5)


@few_examples
@given(random=random_runs(), include_special=st.booleans())
def test_agree_with_a_walk_over_every_decision(random, include_special) -> None:
    layers, shards = random
    with opened(layers, shards) as run:
        counted = list(document_counts(run, include_special=include_special))
        expected = by_router(decisions(layers, shards, include_special=include_special))
        assert [(one.stack, one.layer) for one in counted] == [(one.stack, one.layer) for one in expected]
        for counts, found in zip(counted, expected.values(), strict=True):
            assert_counts(counts, found)


def test_routers_and_labels_are_chosen_and_unknown_ones_refused(tmp_path) -> None:
    layers = [*TINY, Layer(stack="encoder", layer=2, n_experts=3, top_k=1)]
    shard = Shard.of_picks(
        layers, documents=[("en", 1), ("ko", 1)], experts={2: [[0, 1], [2, 3]], ("encoder", 2): [[2], [0]]}
    )
    run = open_run(write_run(tmp_path / "run", layers, [shard]))
    assert [(one.stack, one.n_experts) for one in document_counts(run, layer=2)] == [("decoder", 4), ("encoder", 3)]
    (only,) = document_counts(run, stack="encoder", labels=["ko"])
    assert (only.labels, only.picks_DE.tolist()) == (("ko",), [[1, 0, 0]])
    with pytest.raises(ValueError, match="layer 5 is not recorded"):
        next(document_counts(run, layer=5))
    with pytest.raises(ValueError, match="no document of this run has the label 'xx'"):
        next(document_counts(run, labels=["xx"]))


def test_a_run_without_a_commit_has_no_counts(tmp_path) -> None:
    run = open_run(write_run(tmp_path / "run", TINY, [], complete=False))
    assert list(document_counts(run)) == []
