"""Intervals, tests, split halves and curves: against scipy and numpy, against runs of the drawn documents, by hand."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy import optimize, stats

from benchmarks.calibration import World, false_discoveries, independent_tokens, of_collector
from collector import __main__ as cli
from collector.data.sources import LABEL_SEPARATOR
from collector.query import inference
from collector.query.catalog import find_query, list_queries
from collector.query.document_counts import STATISTICS, DocumentCounts, document_counts, document_losses
from collector.query.inference import permutation, probe, resampling, student, weighted_jaccard
from collector.query.inference.answers import KEYS, SampledQuery, ask
from collector.query.inference.bootstrap import effective_documents, interval, router_intervals, sampled_values
from collector.query.warehouse import Run, open_run
from collector.store.tables import Layer
from tests.helpers.synthetic import Shard, random_shard, write_run

LAYERS = [Layer(layer=0, n_experts=6, top_k=2, has_capacity=True), Layer(layer=3, n_experts=5, top_k=1)]
DOCUMENTS = [("en", 7), ("ko", 5), ("en", 3), ("ko", 9), ("en", 12), ("th", 4), ("th", 6), ("ko", 2)]
LABEL_LEVEL = [
    query.name
    for query in list_queries()
    if {"assignments", "label_statistics", "label_losses"} & {*query.reads}
    and not {"decisions", "document_effects", "token_decisions", "labelled_tokens"} & {*query.reads}
]


@pytest.fixture(scope="module")
def shard() -> Shard:
    return random_shard(np.random.default_rng(5), LAYERS, DOCUMENTS)


@pytest.fixture(scope="module")
def folder(shard: Shard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("inference") / "run", LAYERS, [shard])


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return open_run(folder)


def counts_of(label, tokens, picks) -> DocumentCounts:
    """One router, from lists: a label, its tokens and picks by expert of each document."""
    names, index = np.unique(label, return_inverse=True)
    picked = np.array(picks, np.uint32)
    return DocumentCounts(
        stack="decoder", layer=0, n_experts=picked.shape[1], top_k=1, labels=tuple(names.tolist()), label_D=index,
        shard_D=np.zeros(len(index), np.int64), doc_D=np.arange(len(index)), tokens_D=np.array(tokens),
        statistics_DM=np.zeros((len(index), len(STATISTICS))),
        picks_DE=picked, top1_DE=picked, weight_sum_DE=picked.astype(np.float32),
    )  # fmt: skip


def repeated(shard: Shard, times: np.ndarray) -> Shard:
    """The shard of the same documents, each as often as it was drawn."""
    ends = np.cumsum(shard.lengths)
    drawn = np.repeat(np.arange(len(shard.documents)), times)
    tokens = np.concatenate([np.arange(ends[doc] - shard.lengths[doc], ends[doc]) for doc in drawn])
    return dataclasses.replace(
        shard,
        documents=[shard.documents[doc] for doc in drawn],
        is_special=shard.is_special[tokens],
        experts={layer: array[tokens] for layer, array in shard.experts.items()},
        weights={layer: array[tokens] for layer, array in shard.weights.items()},
        statistics={layer: {n: array[tokens] for n, array in each.items()} for layer, each in shard.statistics.items()},
        dropped={layer: array[tokens] for layer, array in shard.dropped.items()},
        effects={layer: {n: array[tokens] for n, array in each.items()} for layer, each in shard.effects.items()},
        losses=shard.losses[tokens],
        similarity=(),
        probabilities=None,
    )


def keyed(rows: list[dict], column: str) -> dict:
    return {tuple(row.get(key) for key in ("stack", *KEYS)): row[column] for row in rows}


# ---- intervals ----


@pytest.fixture(scope="module")
def drawn(shard: Shard, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Three runs of the documents that seed 1 draws for three samples."""
    labels = [label for label, _ in shard.documents]
    rngs = dict(zip(sorted(set(labels)), resampling.label_generators(("en", "ko", "th"), 1), strict=True))
    times = {label: resampling.draw(rng, labels.count(label), labels.count(label), 3) for label, rng in rngs.items()}
    folder, runs = tmp_path_factory.mktemp("drawn"), []
    for sample in range(3):
        places = {label: iter(times[label][sample].astype(int)) for label in times}
        drawn = repeated(shard, np.array([next(places[label]) for label in labels]))
        runs.append(open_run(write_run(folder / f"{sample}", LAYERS, [drawn])))
    return runs


@pytest.mark.parametrize("name", LABEL_LEVEL)
def test_a_sample_answers_as_a_run_of_the_drawn_documents(name: str, run: Run, drawn: list[Run]) -> None:
    answer, asked = ask(run, name, {})
    of_losses = name == "loss"
    for counts in document_losses(run) if of_losses else document_counts(run, outputs=True):
        same_layer = pa.compute.scalar(True) if of_losses else pa.compute.field("layer") == counts.layer
        here = answer.filter((pa.compute.field("stack") == counts.stack) & same_layer)
        values = sampled_values(asked, here, counts, resamples=3, seed=1)
        for sample, again in enumerate(drawn):
            every = {"n": 1000} if name == "top_experts" else {}
            where = {} if of_losses else {"layer": counts.layer}
            rows = again.query(name, **where, **every).to_arrow_table().to_pylist()
            expected = keyed(rows, "value")
            for key, value in zip(keyed(here.to_pylist(), "value"), values[:, sample], strict=True):
                wanted = expected.get(key, 0.0)
                wanted = math.nan if wanted is None else wanted
                assert value == pytest.approx(wanted, nan_ok=True, rel=1e-5, abs=1e-6), key


def test_there_is_a_label_level_query_of_every_kind() -> None:
    assert {
        "domain_specialization",
        "selection_frequency",
        "top_experts",
        "language_overlap",
        "mutual_information",
        "router_entropy",
        "dropped_tokens",
    } <= {*LABEL_LEVEL}


@pytest.mark.parametrize("name", LABEL_LEVEL)
def test_intervals_keep_the_rows_of_the_query(name: str, run: Run) -> None:
    table = inference.intervals(run, name, resamples=50)
    answer = run.query(name).to_arrow_table()
    for got, wanted in zip(table.select(answer.column_names).to_pylist(), answer.to_pylist(), strict=True):
        assert got == pytest.approx(wanted)  # sums of floats differ in their last digits from run to run
    added = ["documents", "low", "high", "standard_error", "bootstrap_bias"]
    assert table.column_names[len(answer.column_names) :] == added
    assert set(table["documents"].to_pylist()) <= {2, 3}


def test_intervals_hold_the_estimate(run: Run) -> None:
    for row in inference.intervals(run, "domain_specialization", resamples=300).to_pylist():
        assert row["low"] <= row["value"] <= row["high"]


def test_a_biased_answer_is_moved_back_and_an_unbiased_one_is_not() -> None:
    values = np.random.default_rng(0).normal(1.0, 0.1, (2, 999))
    low, high = np.quantile(values, [0.025, 0.975], axis=1)
    found = interval(values.copy(), np.full(2, 10**9), 95, np.array([0.9, np.nan]))
    assert found.bias_R[0] == pytest.approx(values[0].mean() - 0.9)
    assert [found.low_R[0], found.high_R[0]] == pytest.approx([end[0] - 2 * found.bias_R[0] for end in (low, high)])
    assert [found.low_R[1], found.high_R[1]] == pytest.approx([low[1], high[1]])


def test_another_column_has_intervals_of_its_own(run: Run) -> None:
    lift = inference.intervals(run, "domain_specialization", column="lift", resamples=50)
    known = [row for row in lift.to_pylist() if row["low"] is not None]  # null where a sample never chose the expert
    assert known
    assert all(row["low"] <= row["lift"] <= row["high"] for row in known)
    with pytest.raises(ValueError, match="no numbers 'lfit'; it has value, baseline, n, picks, exclusivity"):
        inference.intervals(run, "domain_specialization", column="lfit")


def test_a_label_of_one_document_has_no_interval(tmp_path: Path) -> None:
    shard = random_shard(np.random.default_rng(2), LAYERS, [("en", 9), ("en", 5), ("ko", 8)])
    run = open_run(write_run(tmp_path / "run", LAYERS, [shard]))
    for row in inference.intervals(run, "domain_specialization", resamples=20).to_pylist():
        assert (row["low"] is None) == (row["label"] == "ko") == (row["documents"] == 1)


def test_the_same_seed_gives_the_same_interval_whatever_else_is_asked(run: Run) -> None:
    def of_korean(**params) -> dict:
        rows = inference.intervals(run, "selection_frequency", resamples=40, **params).to_pylist()
        found = {(r["metric"], r["layer"], r["expert"]): (r["low"], r["high"]) for r in rows if r["label"] == "ko"}
        return {key: ends for key, ends in found.items() if key[1] == 3}

    assert of_korean() == of_korean(labels="ko", layer=3)
    assert of_korean(seed=1) != of_korean()


def test_the_spread_is_that_of_scipys_bootstrap() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 60, 25)
    picks = rng.binomial(tokens, rng.beta(2, 5, 25))
    counts = counts_of(["en"] * 25, tokens, np.stack([picks, tokens - picks], axis=1))
    sums = list(resampling.bootstrap(counts, resamples=20_000, seed=0))
    ours = np.concatenate([each.picks_SLE[:, 0, 0] / each.tokens_SL[:, 0] for each in sums])
    ratio = lambda p, t, axis=-1: p.sum(axis) / t.sum(axis)  # noqa: E731
    scipys = stats.bootstrap((picks, tokens), ratio, paired=True, n_resamples=20_000, method="percentile", rng=1)
    assert ours.std(ddof=1) == pytest.approx(scipys.standard_error, rel=0.03)
    assert np.quantile(ours, [0.025, 0.975]) == pytest.approx([*scipys.confidence_interval], abs=0.004)


def test_intervals_of_means_are_those_of_a_bootstrap_of_the_tokens_in_numpy(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    documents = [("en", int(length)) for length in rng.integers(5, 60, 25)]
    shard = random_shard(rng, LAYERS, documents, special=0)
    run = open_run(write_run(tmp_path / "run", LAYERS, [shard]))
    rows = inference.intervals(run, "router_entropy", layer=0, resamples=5000).to_pylist()
    drawn = rng.integers(25, size=(5000, 25))
    # t(0.975, 24) = 2.0639; times sqrt(25 / 24) = 2.1064; the normal tail beyond that is 0.01758
    ends = [0.01758, 1 - 0.01758]
    for metric, recorded in (("router_entropy", "entropy"), ("topk_mass", "topk_mass"), ("margin", "margin")):
        values = shard.statistics[0][recorded].astype(np.float64)
        sums = np.add.reduceat(values, np.cumsum(shard.lengths) - shard.lengths)
        means = sums[drawn].sum(axis=1) / shard.lengths[drawn].sum(axis=1)
        (row,) = (row for row in rows if row["metric"] == metric)
        assert row["value"] == pytest.approx(values.mean(), rel=1e-4)
        assert row["standard_error"] == pytest.approx(means.std(ddof=1), rel=0.03)
        tolerance = 0.15 * row["standard_error"]
        assert [row["low"], row["high"]] == pytest.approx(np.quantile(means, ends), rel=0, abs=tolerance)


def test_quantiles_are_those_of_numpy_further_out_for_few_documents() -> None:
    values = np.random.default_rng(0).normal(size=(3, 999))
    documents = np.array([10**9, 10, 1])
    found = interval(values.copy(), documents, 95)
    low, high, error = found.low_R, found.high_R, found.standard_error_R
    assert [low[0], high[0]] == pytest.approx(np.quantile(values[0], [0.025, 0.975]), abs=1e-6)
    # t(0.975, 9) = 2.2622; times sqrt(10 / 9) = 2.3845; the normal tail beyond that is 0.00855
    assert [low[1], high[1]] == pytest.approx(np.quantile(values[1], [0.00855, 1 - 0.00855]), abs=1e-3)
    assert error[:2] == pytest.approx(values[:2].std(axis=1, ddof=1))
    assert np.isnan([low[2], high[2], error[2]]).all()


def test_documents_of_unequal_length_are_worth_fewer() -> None:
    counts = counts_of(["en"] * 4 + ["ko"] * 3, [1, 1, 1, 3, 2, 2, 2], np.ones((7, 2)))
    of_labels = pa.table({"label": ["ko", "en"]})
    assert effective_documents(of_labels, counts).tolist() == [3.0, 6**2 / 12]
    assert effective_documents(pa.table({"label_a": ["ko"], "label_b": ["en"]}), counts).tolist() == [3.0]
    counts = counts_of(["en"] * 4 + ["ko"] * 3, [1, 1, 1, 9, 2, 2, 2], np.ones((7, 2)))
    assert effective_documents(pa.table({"expert": [0, 1]}), counts).tolist() == [12**2 / 84] * 2


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("router_entropy_quantiles", {}, "reads decisions, layers, and samples.* the sums in.*domain_spec.*router_ent"),
        ("load_balance", {}, "load_balance reads assignments, decisions"),
        ("domain_specialization", {"level": 0.95, "resamples": 1}, "at least 2, got 1"),
        ("domain_specialization", {"level": 100}, "percentage between 0 and 100"),
        ("domain_specialization", {"layer": 7}, "layer 7 is not recorded"),
        ("domain_specialization", {"m": 7}, "no parameter 'm'"),
    ],
)
def test_what_cannot_be_had_is_refused(name: str, given: dict, message: str, run: Run) -> None:
    with pytest.raises(ValueError, match=message):
        inference.intervals(run, name, **given)


def test_weighted_jaccard_takes_experts_that_may_agree_as_agreeing() -> None:
    rng = np.random.default_rng(4)
    use = np.array([[0.5, 0.2, 0.2, 0.1], [0.2, 0.21, 0.19, 0.4]])
    samples = use + rng.normal(0, 0.02, (400, 2, 4))
    low, high = weighted_jaccard.distance_ends(use, samples, 0.03)
    upwards, downwards = [], []
    for sample in samples:
        z = [(a - b) / sample.sum() for a, b in sample.T]
        noise = [each - (a - b) / 2 for each, (a, b) in zip(z, use.T, strict=True)]
        # the first and the last expert differ by 20 standard errors; the others by less than sqrt(2 ln 4) = 1.67
        upwards.append(noise[0] - noise[3] + abs(noise[1]) + abs(noise[2]))
        downwards.append(sum(map(abs, z)) - 0.31)
    assert low == pytest.approx(0.31 - np.quantile(upwards, 0.97))
    assert high == pytest.approx(0.31 - np.quantile(downwards, 0.03))


def test_intervals_of_weighted_jaccard_reach_1_where_labels_may_agree() -> None:
    rng = np.random.default_rng(0)
    names, picks = ["a", "b"] * 15 + ["c"] * 15, rng.multinomial(30, [0.25] * 4, 45)
    picks[30:, 0] += 300
    counts = counts_of(names, picks.sum(axis=1), picks)
    asked = SampledQuery(find_query("language_overlap"), {})
    rows = asked.answer(counts, resampling.whole(counts))
    found, _ = router_intervals(asked, rows, counts, resamples=200, seed=0)
    plain = interval(sampled_values(asked, rows, counts, resamples=200, seed=0), effective_documents(rows, counts), 95)
    at = {(r["metric"], r["label_a"], r["label_b"]): place for place, r in enumerate(rows.to_pylist())}
    ends = {key: (found.low_R[place], found.high_R[place]) for key, place in at.items()}
    assert ends["weighted_jaccard", "a", "a"] == pytest.approx((1, 1))
    assert ends["weighted_jaccard", "a", "b"] == ends["weighted_jaccard", "b", "a"]
    assert 0.5 < ends["weighted_jaccard", "a", "b"][0] < ends["weighted_jaccard", "a", "b"][1] == 1
    assert ends["weighted_jaccard", "a", "c"][1] < 0.5
    jaccard = at["jaccard", "a", "c"]
    assert ends["jaccard", "a", "c"] == (plain.low_R[jaccard], plain.high_R[jaccard])


# ---- the permutation test ----


def test_the_statistic_worked_out_by_hand() -> None:
    counts = counts_of(["a", "a", "b", "b"], [5, 5, 5, 5], [[4, 1], [2, 3], [1, 4], [3, 2]])
    t, _ = permutation.p_values(counts, resamples=1, seed=0)
    # expert 0: shares 6 / 10 and 4 / 10; picks beyond them 4 - 3, 2 - 3 and 1 - 2, 3 - 2; variances 2 / 1 * 2 / 10^2
    expected = 0.2 / math.sqrt(0.04 + 0.04)
    assert t == pytest.approx(np.array([[expected, -expected], [-expected, expected]]))


def test_labels_that_are_told_apart_by_every_document_have_the_smallest_p() -> None:
    tokens = [3, 5, 7, 4, 6, 8, 9, 2]
    picks = [[n, 0] if place < 4 else [0, n] for place, n in enumerate(tokens)]
    _, p = permutation.p_values(counts_of(["a"] * 4 + ["b"] * 4, tokens, picks), resamples=20_000, seed=0)
    # one of the 70 ways to choose four documents of eight
    assert p[0] == pytest.approx([1 / 70, 1], abs=0.003)


@pytest.mark.parametrize("alternative", ["greater", "less", "two-sided"])
def test_p_values_are_those_of_scipys_exact_test(alternative: str) -> None:
    rng = np.random.default_rng(3)
    tokens = rng.integers(5, 30, 9)
    picks = rng.binomial(tokens, rng.beta(2, 3, 9))
    counts = counts_of(["a"] * 4 + ["b"] * 5, tokens, np.stack([picks, tokens - picks], axis=1))
    _, p = permutation.p_values(counts, resamples=20_000, seed=0, alternative=alternative)

    def t_of_a(in_a: np.ndarray) -> float:
        groups = in_a.astype(int), np.setdiff1d(np.arange(9), in_a)
        shares = [picks[i].sum() / tokens[i].sum() for i in groups]
        errors = [np.std(picks[i] - share * tokens[i], ddof=1) for i, share in zip(groups, shares, strict=True)]
        variances = [len(i) * error**2 / tokens[i].sum() ** 2 for i, error in zip(groups, errors, strict=True)]
        t = (shares[0] - shares[1]) / math.sqrt(sum(variances))
        return abs(t) if alternative == "two-sided" else t

    exact = stats.permutation_test(
        (np.arange(4), np.arange(4, 9)), lambda in_a, _: t_of_a(in_a), n_resamples=np.inf, vectorized=False,
        alternative="greater" if alternative == "two-sided" else alternative,
    )  # fmt: skip
    assert p[0, 0] == pytest.approx(exact.pvalue, abs=0.01)


def test_rows_carry_the_shares_and_benjamini_and_hochbergs_q(run: Run) -> None:
    table = inference.specialization_test(document_counts(run), resamples=99, level=0.3)
    rows = {(r["stack"], r["layer"], r["label"], r["expert"]): r for r in table.to_pylist()}
    answer = run.query("domain_specialization").to_arrow_table().to_pylist()
    assert len(rows) == len(answer)
    for wanted in answer:
        got = rows[wanted["stack"], wanted["layer"], wanted["label"], wanted["expert"]]
        assert (got["value"], got["n"]) == (pytest.approx(wanted["value"]), wanted["n"])
        assert got["difference"] == pytest.approx(got["value"] - got["pooled"])
    p = np.sort(table["p"].to_numpy())
    q = np.minimum.accumulate((p * len(p) / np.arange(1, len(p) + 1))[::-1])[::-1]
    assert np.sort(table["q"].to_numpy()) == pytest.approx(q)
    assert table["q"].to_pylist() == sorted(table["q"].to_pylist())
    assert [r["significant"] for r in table.to_pylist()] == [r["q"] <= 0.3 for r in table.to_pylist()]


def test_sums_by_label_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    labels, values = rng.integers(0, 3, (4, 10)).astype(np.int32), rng.normal(size=(10, 5))
    sums = permutation.group_sums(labels, values, 3)
    for sample in range(4):
        for label in range(3):
            assert sums[sample, label] == pytest.approx(values[labels[sample] == label].sum(axis=0))


def test_the_same_seed_gives_the_same_p(run: Run) -> None:
    first, second, other = (
        inference.specialization_test(document_counts(run), resamples=50, seed=seed) for seed in (4, 4, 5)
    )
    assert first.equals(second)
    assert not first.equals(other)


def test_an_expert_that_nobody_chooses_is_no_discovery() -> None:
    counts = counts_of(["a", "a", "b", "b"], [5, 6, 7, 8], [[5, 0], [6, 0], [7, 0], [8, 0]])
    table = inference.specialization_test([counts], resamples=20)
    assert set(table["p"].to_pylist()) == {1.0}
    assert [row["lift"] for row in table.to_pylist() if row["expert"] == 1] == [None, None]


@pytest.mark.parametrize(
    ("resamples", "message"),
    [
        (10, "10 shuffles allow none, it takes --resamples 19 at least"),
        (999, "p is 0.001 at least, and 10 cells must have that before one counts: --resamples 10,000 would"),
        (20_000, "0 of 500 cells are significant at a false discovery rate of 0.05"),
    ],
)
def test_says_when_there_are_too_few_shuffles(resamples: int, message: str) -> None:
    table = pa.table({"significant": np.zeros(500, bool), "documents": np.full(500, 2)})
    assert message in inference.remark(table, resamples, 0.05)


def unequal(rng: np.random.Generator) -> tuple[DocumentCounts, np.ndarray]:
    """Documents of two labels that differ in length and in how much their shares vary; and which are of label a."""
    in_a = np.arange(19) < 7
    tokens = np.where(in_a, rng.integers(5, 40, 19), rng.integers(30, 200, 19))
    taste = np.where(in_a, rng.beta(0.6, 2, 19), rng.beta(20, 50, 19))
    picks = rng.binomial(tokens, taste)
    return counts_of(np.where(in_a, "a", "b").tolist(), tokens, np.stack([picks, tokens - picks], axis=1)), in_a


def test_students_t_is_that_of_each_documents_residual() -> None:
    counts, in_a = unequal(np.random.default_rng(1))
    n, picks = counts.tokens_D.astype(float), counts.picks_DE[:, 0].astype(float)
    pooled = picks.sum() / n.sum()
    variances, freedoms, shares = [], [], []
    for own in (in_a, ~in_a):
        share, length = picks[own].sum() / n[own].sum(), n[own]
        # what the residuals e = (1 - n 1' / N) x lose of the sum of var x, if sd x is proportional to n
        left = np.eye(len(length)) - np.outer(length, np.ones(len(length))) / length.sum()
        lost = np.trace(left @ np.diag(length**2) @ left.T) / (length**2).sum()
        variance = ((picks[own] - share * length) ** 2).sum() / length.sum() ** 2 / lost
        f = pooled * (1 - pooled) / (share * (1 - share))
        g = length.sum() * (length**3).sum() / (length**2).sum() ** 2
        variances.append(variance * (1 + 2 * g * (f - 1) if f > 1 else f))
        freedoms.append((length**2).sum() ** 2 / (length**4).sum() - 1)
        shares.append(share)
    t = (shares[0] - shares[1]) / math.sqrt(sum(variances))
    freedom = sum(variances) ** 2 / sum(v**2 / m for v, m in zip(variances, freedoms, strict=True))
    less, greater = student.t_tails(counts, permutation.expected_picks(counts))
    expected = stats.t.cdf(t, freedom)
    assert less == pytest.approx(np.array([[expected, 1 - expected], [1 - expected, expected]]))
    assert greater == pytest.approx(1 - less)


def test_students_t_of_documents_of_one_length_is_welchs_at_the_pooled_share() -> None:
    picks = np.array([2, 3, 4, 6, 7, 8, 9])
    counts = counts_of(["a"] * 3 + ["b"] * 4, [10] * 7, np.stack([picks, 10 - picks], axis=1))
    less, _ = student.t_tails(counts, permutation.expected_picks(counts))
    # shares 0.3 and 0.75, pooled 39 / 70; f = (39 * 31 / 70^2) / 0.21 and / 0.1875, both above 1
    w_a = 0.01 / 3 * (1 + 2 * (39 * 31 / 4900 / 0.21 - 1))
    w_b = np.var([0.6, 0.7, 0.8, 0.9], ddof=1) / 4 * (1 + 2 * (39 * 31 / 4900 / 0.1875 - 1))
    freedom = (w_a + w_b) ** 2 / (w_a**2 / 2 + w_b**2 / 3)
    assert less[0, 0] == pytest.approx(stats.t.cdf(-0.45 / math.sqrt(w_a + w_b), freedom))


@pytest.mark.parametrize("alternative", ["greater", "less", "two-sided"])
def test_p_is_the_larger_of_the_shuffles_and_of_students_t(alternative: str) -> None:
    counts, _ = unequal(np.random.default_rng(2))
    table = inference.specialization_test([counts], resamples=99, alternative=alternative)
    found = {(row["label"], row["expert"]): row["p"] for row in table.to_pylist()}
    _, shuffled = permutation.p_values(counts, resamples=99, seed=0, alternative=alternative)
    less, greater = student.t_tails(counts, permutation.expected_picks(counts))
    tails = {"less": less, "greater": greater, "two-sided": np.minimum(1, 2 * np.minimum(less, greater))}[alternative]
    for label, expert in itertools.product((0, 1), repeat=2):
        assert found["ab"[label], expert] == pytest.approx(max(shuffled[label, expert], tails[label, expert]))


def test_a_single_document_shows_nothing_about_its_label() -> None:
    tokens = [40, *[40] * 30]
    picks = [[40, 0], *([[4, 36], [6, 34]] * 15)]
    table = inference.specialization_test([counts_of(["a"] + ["b"] * 30, tokens, picks)], resamples=999)
    assert set(table["p"].to_pylist()) == {1.0}  # the shuffles alone say 1 / 31
    assert "2 are of labels with a single document" in inference.remark(table, 999, 0.05)


def test_a_run_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="no router has a token to count"):
        inference.specialization_test([])


def test_a_single_label_cannot_be_tested(run: Run) -> None:
    with pytest.raises(ValueError, match="takes two labels at least; there is ko"):
        inference.specialization_test(document_counts(run, labels=["ko"]))


# ---- calibration, in short; python -m benchmarks.calibration is the long form ----


def test_labels_that_say_nothing_give_no_discoveries_and_independent_tokens_do() -> None:
    world = World(documents=(15,) * 4, tokens=(40,) * 4, concentration=(8,) * 4)
    ours = false_discoveries(world, of_collector, runs=40, resamples=999)
    theirs = false_discoveries(world, independent_tokens, runs=40, resamples=0)
    assert ours.any_false <= 0.15  # 0.05 and three standard errors of 40 runs
    assert ours.small_p == pytest.approx(0.05, abs=0.02)
    assert theirs.any_false == 1
    assert theirs.small_p > 0.2


def test_planted_effects_are_found() -> None:
    world = World(documents=(30,) * 4, tokens=(40,) * 4, concentration=(8,) * 4, effect=0.3)
    errors = false_discoveries(world, of_collector, runs=10, resamples=999)
    assert errors.found > 0.9
    assert errors.false_share <= 0.1


# ---- split halves ----


def test_halves_are_halves_and_agree_as_numpy_says() -> None:
    counts = counts_of(["a"] * 2 + ["b"] * 2, [10, 20, 10, 20], [[9, 1], [4, 16], [2, 8], [5, 15]])
    table = inference.split_half([counts], splits=50)
    rows = {(row["metric"], row["label"]): row for row in table.to_pylist()}
    # two documents each: the halves are (9, 4) and (2, 5) of 10 and 20, in either order
    raw = [0.9, 0.1, 0.2, 0.8], [0.2, 0.8, 0.25, 0.75]
    crossed = [0.9, 0.1, 0.25, 0.75], [0.2, 0.8, 0.2, 0.8]
    both = sorted(np.corrcoef(*each)[0, 1] for each in (raw, crossed))
    everything = rows["domain_specialization", None]
    assert both[0] <= everything["value"] <= both[1]
    assert everything["spearman_brown"] == pytest.approx(2 * everything["value"] / (1 + everything["value"]))
    assert rows["domain_specialization", "a"]["value"] == pytest.approx(-1)
    assert rows["domain_specialization", "b"]["value"] == pytest.approx(1)
    assert {row["documents"] for row in table.to_pylist()} == {2}


def test_differences_repeat_only_where_labels_differ() -> None:
    rng = np.random.default_rng(0)
    without = inference.split_half([World().run(rng)], splits=50).to_pylist()
    with_effect = inference.split_half([World(effect=0.3).run(rng)], splits=50).to_pylist()
    value = lambda rows, metric: next(r["value"] for r in rows if (r["metric"], r["label"]) == (metric, None))  # noqa: E731
    assert value(without, "domain_specialization") > 0.8  # some experts are popular with everybody
    assert abs(value(without, "difference")) < 0.2
    assert value(with_effect, "difference") > 0.6


# ---- the probe ----


def routers_of(label, tokens, *shares) -> list[DocumentCounts]:
    """Routers whose picks of each document are these shares of its tokens, [D, E]."""
    return [
        dataclasses.replace(counts_of(label, tokens, np.multiply(tokens, np.transpose(each)).T), layer=layer)
        for layer, each in enumerate(shares)
    ]


@pytest.fixture
def few_shuffles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes a fit for each fold."""
    monkeypatch.setattr(probe, "_SHUFFLES", 4)


@pytest.mark.usefixtures("few_shuffles")
def test_a_probe_finds_what_separates_labels_and_nothing_where_nothing_does() -> None:
    rng = np.random.default_rng(0)
    label, tokens = ["a", "b"] * 30, np.full(60, 100)
    apart = np.array([[0.8, 0.2], [0.2, 0.8]] * 30)
    blind = rng.integers(0, 101, (60, 1)) / 100 * [1, -1] + [0, 1]
    rows = inference.label_probe(routers_of(label, tokens, apart, blind)).to_pylist()
    assert [(row["metric"], row["layer"]) for row in rows] == [
        (metric, layer) for metric in ("accuracy", "balanced_accuracy") for layer in (0, 1, None)
    ]
    for row in rows:
        assert (row["n"], row["labels"], row["documents"], row["folds"]) == (60, 2, 30, 5)
        assert row["value"] == pytest.approx(1) if row["layer"] != 1 else 0.3 < row["value"] < 0.7
        assert 0.4 < row["baseline"] < 0.6
        assert row["length_alone"] <= 0.5, "all are equally long"


@pytest.mark.usefixtures("few_shuffles")
def test_the_length_alone_tells_labels_of_other_lengths() -> None:
    """In the middle, too, between two others; the experts are drawn at random."""
    rng = np.random.default_rng(1)
    label, tokens = ["a", "b", "c"] * 20, np.array([10, 100, 1000] * 20) + rng.integers(0, 5, 60)
    blind = rng.dirichlet(np.ones(3), 60)
    (row, _) = inference.label_probe(routers_of(label, tokens, blind)).to_pylist()
    assert (row["layer"], row["length_alone"]) == (0, 1)
    assert row["value"] < 0.6


@pytest.mark.usefixtures("few_shuffles")
def test_the_probe_is_a_regression_written_out() -> None:
    """Minimized by scipy, fold by fold, with the columns scaled as the other folds are."""
    from sklearn.model_selection import StratifiedKFold

    rng = np.random.default_rng(2)
    label = np.repeat([0, 1, 2], [14, 10, 9])
    share = rng.dirichlet(np.ones(5), 33) + 0.25 * np.eye(3, 5)[label]
    counts = routers_of(list(np.array(list("abc"))[label]), np.full(33, 1000), share / share.sum(1, keepdims=True))
    signature = counts[0].picks_DE / 1000
    predicted = np.empty(33, int)
    for fitted, left_out in StratifiedKFold(3, shuffle=True, random_state=4).split(signature, label):
        scaled = (signature - signature[fitted].mean(0)) / signature[fitted].std(0)

        def loss(weights, fitted=fitted, scaled=scaled) -> float:
            w, b = np.split(weights, [15])
            scores = scaled[fitted] @ w.reshape(5, 3) + b
            return (np.log(np.exp(scores).sum(1)) - scores[np.arange(len(fitted)), label[fitted]]).sum() + w @ w / 2

        w, b = np.split(optimize.minimize(loss, np.zeros(18)).x, [15])
        predicted[left_out] = (scaled[left_out] @ w.reshape(5, 3) + b).argmax(1)
    expected = {
        "accuracy": np.mean(predicted == label),
        "balanced_accuracy": np.mean([np.mean(predicted[label == each] == each) for each in range(3)]),
    }
    assert 0.5 < expected["accuracy"] < 1
    rows = inference.label_probe(counts, folds=3, seed=4).to_pylist()
    assert {row["metric"]: row["value"] for row in rows} == pytest.approx(expected)


@pytest.mark.usefixtures("few_shuffles")
def test_of_many_documents_a_sample_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_MOST", 20)
    shares = np.array([[0.8, 0.2], [0.2, 0.8], [0.2, 0.8]] * 12)
    row, _ = inference.label_probe(routers_of(["a", "b", "b"] * 12, np.full(36, 10), shares), folds=2).to_pylist()
    assert (row["n"], row["documents"], row["value"]) == (6 + 13, 6, 1)


@pytest.mark.usefixtures("few_shuffles")
def test_a_document_that_one_router_did_not_see_is_probed_by_the_others() -> None:
    one, other = routers_of(["a", "b"] * 6, np.full(12, 10), *[[[0.8, 0.2], [0.2, 0.8]] * 6] * 2)
    rows = inference.label_probe([one, other.of(np.arange(12) != 3)], folds=3).to_pylist()
    assert {row["n"] for row in rows} == {12}
    assert {row["value"] for row in rows if row["layer"] != 1} == {1}


@pytest.mark.parametrize(
    ("label", "folds", "message"),
    [
        (["a"] * 6, 2, "two at least; there is a"),
        (["a"] * 5 + ["b"], 2, "1 labels have fewer than 2 documents, first b"),
        (["a"] * 6, 1, "folds must be at least 2, got 1"),
        (["a", f"a{LABEL_SEPARATOR}b"] * 3, 2, "documents have several labels here"),
    ],
)
def test_what_no_probe_can_tell_is_refused(label: list[str], folds: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inference.label_probe(routers_of(label, np.full(6, 10), [[0.5, 0.5]] * 6), folds=folds)


def test_a_probe_without_routers_or_its_package_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="nothing to probe"):
        inference.label_probe([])
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match=r"pip install 'moe-routing-collector\[probe\]'"):
        inference.label_probe([])


# ---- sample-size curves ----


def test_the_curve_passes_through_the_interval_and_narrows(run: Run) -> None:
    where = {"layer": 3, "labels": "en,ko", "resamples": 400}
    curve = inference.sample_size_curve(run, sizes=[3, 300], **where).to_pylist()
    intervals = inference.intervals(run, "domain_specialization", **where).to_pylist()
    at = {(row["label"], row["expert"], row["documents"]): row for row in curve}
    for row in intervals:
        same, more = (at[row["label"], row["expert"], size] for size in (3, 300))
        assert (same["standard_error"], same["available"]) == (row["standard_error"], 3)
        assert more["value"] == pytest.approx(row["value"], abs=0.02)
        # ten times narrower, but for the quantiles further out at 3 documents
        assert more["standard_error"] <= same["standard_error"] / 5 + 1e-9


def test_default_sizes_reach_beyond_the_documents_there_are(run: Run) -> None:
    sizes = {row["documents"] for row in inference.sample_size_curve(run, resamples=5).to_pylist()}
    assert sizes == {10}
    with pytest.raises(ValueError, match="2 at least, got \\[1\\]"):
        inference.sample_size_curve(run, sizes=[1])


def test_every_query_of_assignments_alone_can_have_intervals() -> None:
    assert {query.name for query in list_queries() if query.reads == ("assignments",)} <= {*LABEL_LEVEL}
    assert find_query("reference_difference").name in LABEL_LEVEL


# ---- labels that are groups of tokens ----


@pytest.fixture(scope="module")
def by_position(tmp_path_factory: pytest.TempPathFactory) -> Run:
    long = random_shard(np.random.default_rng(6), LAYERS, [("en", 40), ("ko", 90), ("en", 20), ("ko", 70)])
    return open_run(write_run(tmp_path_factory.mktemp("position") / "run", LAYERS, [long]), by="position")


def test_documents_are_drawn_whole_where_labels_are_groups_of_their_tokens(by_position: Run) -> None:
    counts = next(document_counts(by_position, layer=3))
    sums = next(resampling.bootstrap(counts, resamples=200, seed=3))
    assert len(sums.labels) > 1
    tokens_of_document = np.bincount(resampling.document_numbers(counts), counts.tokens_D).astype(int)
    possible = {sum(drawn) for drawn in itertools.combinations_with_replacement(tokens_of_document.tolist(), 4)}
    assert {int(total) for total in sums.tokens_SL.sum(axis=1)} <= possible


def test_groups_of_tokens_have_intervals_but_no_shuffles(by_position: Run) -> None:
    table = inference.intervals(by_position, "domain_specialization", layer=3, resamples=50)
    assert table.num_rows == len(by_position.query("domain_specialization", layer=3).fetchall())
    for refused in (inference.specialization_test, inference.split_half, inference.label_probe):
        with pytest.raises(ValueError, match="documents have tokens of several labels here"):
            refused(document_counts(by_position))


# ---- the command line ----


def collector(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[list[dict], str]:
    """Rows and complaints of a command that writes JSON."""
    assert cli.parse([*arguments, "--format", "json"]).run() == 0
    written = capsys.readouterr()
    return json.loads(written.out), written.err


def test_the_command_line_gives_intervals(run: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--interval", "90", "--resamples", "30", "--seed", "2", "--column", "lift", "--layer", "3"]
    rows, complaint = collector(capsys, "query", str(folder), "domain_specialization", *arguments)
    expected = inference.intervals(
        run, "domain_specialization", level=90, resamples=30, seed=2, column="lift", layer=3
    ).to_pylist()
    assert [row["low"] for row in rows] == pytest.approx([row["low"] for row in expected])
    assert (
        complaint
        == "15 of 15 rows rest on fewer than 20 documents of a label (column documents): read them with care\n"
    )


@pytest.mark.usefixtures("few_shuffles")
def test_the_command_line_tests(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["test", str(folder), "--layer", "0", "--labels", "en", "ko", "--resamples", "20"]
    rows, complaint = collector(capsys, *where, "--alternative", "two-sided", "--level", "0.2")
    assert {row["label"] for row in rows} == {"en", "ko"}
    assert "of 12 cells are significant at a false discovery rate of 0.2" in complaint
    rows, _ = collector(capsys, *where, "--split-half")
    assert {(row["metric"], row["splits"]) for row in rows} == {("domain_specialization", 20), ("difference", 20)}
    rows, _ = collector(capsys, *where, "--sample-size-curve")
    assert {row["documents"] for row in rows} == {10}
    rows, _ = collector(capsys, *where, "--probe", "--folds", "2")
    assert {(row["metric"], row["layer"], row["folds"]) for row in rows} == {
        ("accuracy", 0, 2), ("balanced_accuracy", 0, 2)
    }  # fmt: skip
    with pytest.raises(ValueError, match="ask one at a time"):
        cli.Test(run_=str(folder), split_half=True, sample_size_curve=True)
