"""Measures the calibration of intervals and tests on simulated runs whose truth is known.

    python -m benchmarks.calibration                    # 200 runs of each kind: some minutes
    python -m benchmarks.calibration --runs 20          # a quick look
    python -m benchmarks.calibration --parts tests      # false discoveries only

A simulated document has its own preferences. Experts form k groups, and a token takes one expert from each; the
document's probabilities in a group are drawn from a Dirichlet distribution around its label's. So the tokens of a
document are correlated, and a label's domain specialization is known exactly. The document's router entropy is drawn
around its label's (gamma), and that of its tokens around the document's (exponential). Lengths vary (log-normal).

(tests) Kinds of runs: labels without any effect; labels that differ in number, length and uniformity of documents but
not in domain specialization; one label of few varied documents among many uniform ones; half of the labels with an
increased share of one expert. Tests: the one of `collector test`, its shuffles alone, the same without a standard
error, and a z test that treats tokens as independent. For each it prints the share of runs with a false discovery, the
mean share of false discoveries, the share of p <= 0.05 among true nulls (over all labels, and for the worst label), for
the worst label also that of p <= 0.005 in units of 0.005, and the share of the planted effects that are found.
(coverage) How often intervals contain the true value, by metric and number of documents per label: for labels that
are equal except for planted effects, and for labels that all differ; and how much wider they are than the quantiles of
the samples. Only pairs of labels that differ count, because a divergence of 0 lies at the end of its range.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy import stats

from collector.query.catalog import find_query
from collector.query.document_counts import STATISTICS, DocumentCounts
from collector.query.inference.answers import SampledQuery
from collector.query.inference.bootstrap import router_intervals
from collector.query.inference.permutation import SIGNED, Alternative, group_sums, larger_p_values, p_values
from collector.query.inference.resampling import Sums, whole

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

TOP_K = 4
ENTROPY = STATISTICS.index("router_entropy")
"""Index of the simulated statistic, with a mean of 1 for every label; the others are NaN."""
LEVEL = 0.05


# -- simulated runs ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """Distribution of simulated runs with L labels, and E experts in k groups, of which a token takes one each."""

    documents: tuple[int, ...] = (40,) * 8
    tokens: tuple[float, ...] = (60.0,) * 8
    """Mean length of a label's documents."""
    concentration: tuple[float, ...] = (8.0,) * 8
    """Concentration c of the Dirichlet distributions: two tokens of a document agree 1 / (1 + c) above chance."""
    effect: float = 0.0
    """Increase in domain specialization for one expert in each label of the first half."""
    all_differ: bool = False
    """Whether each label has its own preferences."""
    experts: int = 16
    """Number of experts, a multiple of k."""

    @property
    def truth_LE(self) -> NDArray[np.float64]:
        """Domain specialization of each label, of shape [L, E]; sums to k."""
        base_GX = np.random.default_rng(0).dirichlet(np.full(self.experts // TOP_K, 4.0), size=TOP_K)
        truth_LGX = np.tile(base_GX, (len(self.documents), 1, 1))
        if self.all_differ:
            truth_LGX = np.random.default_rng(1).standard_gamma(12 * truth_LGX)
            truth_LGX /= truth_LGX.sum(axis=2, keepdims=True)
        for label in range(len(self.documents) // 2):
            group_X = truth_LGX[label, label % TOP_K]
            rest = 1 - group_X[0]
            group_X *= (rest - self.effect) / rest
            group_X[0] = 1 - rest + self.effect
        return truth_LGX.reshape(-1, self.experts)

    @property
    def nothing_LE(self) -> NDArray[np.bool_]:
        """Whether a label chooses an expert no more than the other labels do, of shape [L, E]."""
        tokens_L1 = np.multiply(self.documents, self.tokens)[:, None]
        picks_LE = self.truth_LE * tokens_L1
        others_LE = (picks_LE.sum(axis=0) - picks_LE) / (tokens_L1.sum() - tokens_L1)
        return self.truth_LE <= others_LE + 1e-12

    def run(self, rng: np.random.Generator) -> DocumentCounts:
        """Simulates the counts of one run."""
        label_D = np.repeat(np.arange(len(self.documents)), self.documents)
        spread = 0.5
        lengths_D = np.take(self.tokens, label_D) * rng.lognormal(-(spread**2) / 2, spread, len(label_D))
        tokens_D = np.ceil(lengths_D).astype(np.int64)
        alpha_DGX = (self.truth_LE * np.array(self.concentration)[:, None])[label_D].reshape(len(label_D), TOP_K, -1)
        taste_DGX = rng.standard_gamma(alpha_DGX) + 1e-12
        taste_DGX /= taste_DGX.sum(axis=2, keepdims=True)
        picks_DE = rng.multinomial(tokens_D[:, None], taste_DGX).reshape(len(label_D), self.experts).astype(np.uint32)
        first_DE = np.where(np.arange(self.experts) < self.experts // TOP_K, picks_DE, 0).astype(np.uint32)
        concentration_D = np.array(self.concentration)[label_D]
        statistics_DM = np.full((len(label_D), len(STATISTICS)), np.nan)
        entropy_D = rng.standard_gamma(concentration_D) / concentration_D
        statistics_DM[:, ENTROPY] = entropy_D * rng.standard_gamma(tokens_D)
        labels = tuple(f"label {i}" for i in range(len(self.documents)))
        zeros_D = np.zeros(len(label_D), np.int64)
        return DocumentCounts(
            stack="decoder", layer=0, n_experts=self.experts, top_k=TOP_K, labels=labels, label_D=label_D,
            shard_D=zeros_D, doc_D=np.arange(len(label_D)), tokens_D=tokens_D, statistics_DM=statistics_DM,
            picks_DE=picks_DE, top1_DE=first_DE, weight_sum_DE=(picks_DE / TOP_K).astype(np.float32),
        )  # fmt: skip


WORLDS = {
    "labels say nothing": World(),
    "nothing, unequal documents": World(
        documents=(80, 80, 40, 40, 20, 20, 12, 12), tokens=(20, 200, 20, 200, 20, 200, 20, 200),
        concentration=(2, 30, 30, 2, 30, 2, 2, 30),
    ),
    "nothing, 64 experts, unequal documents": World(
        documents=(80, 80, 40, 40, 20, 20, 12, 12), tokens=(20, 200, 20, 200, 20, 200, 20, 200),
        concentration=(2, 30, 30, 2, 30, 2, 2, 30), experts=64,
    ),
    "nothing, a varied label": World(documents=(100, 100, 15), tokens=(60,) * 3, concentration=(30, 30, 2)),
    "half of the labels, +0.15": World(effect=0.15),
}  # fmt: skip


# -- tests -------------------------------------------------------------------------------------------


def of_collector(counts: DocumentCounts, resamples: int, alternative: Alternative) -> NDArray[np.float64]:
    """Returns the p values of `collector test`, of shape [L, E]."""
    return larger_p_values(counts, resamples=resamples, seed=0, alternative=alternative)[1]


def shuffled(counts: DocumentCounts, resamples: int, alternative: Alternative) -> NDArray[np.float64]:
    """Returns p values of its shuffles alone, of shape [L, E]."""
    return p_values(counts, resamples=resamples, seed=0, alternative=alternative)[1]


def difference_alone(counts: DocumentCounts, resamples: int, alternative: Alternative) -> NDArray[np.float64]:
    """Returns p values from the same shuffles, for the difference without its standard error, of shape [L, E]."""
    return p_values(counts, resamples=resamples, seed=0, alternative=alternative, statistic=difference)[1]


def difference(sums_SLC: NDArray[np.float64], documents_L: NDArray[np.integer]) -> NDArray[np.float64]:  # noqa: ARG001
    """Returns domain specialization minus the pooled share, of shape [S, L, E]."""
    return np.split(sums_SLC[:, :, 2:], 3, axis=2)[0] / sums_SLC[:, :, :1]


def independent_tokens(
    counts: DocumentCounts,
    resamples: int,  # noqa: ARG001
    alternative: Alternative,
) -> NDArray[np.float64]:
    """Returns p values [L, E] of a z test of two proportions, label against others, as if tokens were independent."""
    labels = len(counts.labels)
    picks_LE = group_sums(counts.label_D[None], counts.picks_DE.astype(np.float64), labels)[0]
    n_L1 = np.bincount(counts.label_D, counts.tokens_D)[:, None]
    others_L1 = n_L1.sum() - n_L1
    pooled_E = picks_LE.sum(axis=0) / n_L1.sum()
    difference_LE = picks_LE / n_L1 - (picks_LE.sum(axis=0) - picks_LE) / others_L1
    error_LE = np.sqrt(pooled_E * (1 - pooled_E) * (1 / n_L1 + 1 / others_L1))
    z_LE = difference_LE / error_LE
    return 2 * stats.norm.sf(np.abs(z_LE)) if alternative == "two-sided" else stats.norm.sf(SIGNED[alternative](z_LE))


TESTS: dict[str, Callable[[DocumentCounts, int, Alternative], NDArray[np.float64]]] = {
    "collector test": of_collector,
    "documents shuffled, studentized": shuffled,
    "documents shuffled, difference alone": difference_alone,
    "tokens independent": independent_tokens,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Errors:
    """Error rates of a test over simulated runs."""

    any_false: float
    """Share of runs with a false discovery."""
    false_share: float
    """Mean share of false discoveries among the discoveries of a run."""
    small_p: float
    """Share of p <= 0.05 among true nulls."""
    small_p_worst: float
    """The same for the worst label."""
    smaller_p_worst: float
    """Share of p <= 0.005 among true nulls for the worst label, divided by 0.005."""
    found: float
    """Share of the planted effects that are found; NaN if there are none."""


def false_discoveries(
    world: World, test: Callable, runs: int, resamples: int, alternative: Alternative = "greater"
) -> Errors:
    """Simulates runs, tests each, and returns the error rates."""
    nothing_LE = world.nothing_LE
    planted_LE = world.truth_LE - dataclasses.replace(world, effect=0.0).truth_LE > world.effect / 2
    p_RLE = np.array([test(world.run(np.random.default_rng([1, run])), resamples, alternative) for run in range(runs)])
    q_RLE = stats.false_discovery_control(p_RLE.reshape(runs, -1), axis=1, method="bh").reshape(p_RLE.shape)
    found_RLE = q_RLE <= LEVEL
    small_LE, smaller_LE = ((p_RLE <= level).mean(axis=0) for level in (LEVEL, LEVEL / 10))
    false_R = (found_RLE & nothing_LE).sum(axis=(1, 2))
    return Errors(
        any_false=float((false_R > 0).mean()),
        false_share=float((false_R / np.maximum(found_RLE.sum(axis=(1, 2)), 1)).mean()),
        small_p=float(small_LE[nothing_LE].mean()),
        small_p_worst=float(small_LE.mean(axis=1, where=nothing_LE).max()),
        smaller_p_worst=float(smaller_LE.mean(axis=1, where=nothing_LE).max() / (LEVEL / 10)),
        found=float(found_RLE[:, planted_LE].mean()) if world.effect else float("nan"),
    )


def measure_tests(
    runs: int, resamples: int, kinds: Sequence[str], tests: Sequence[str], alternative: Alternative
) -> None:
    """Prints a row per kind of run and test."""
    heads = ("runs", "test", "with a false discovery", "false share", "p <= 0.05", "worst label", "at 0.005", "found")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for kind in kinds:
        for name in tests:
            errors = false_discoveries(WORLDS[kind], TESTS[name], runs, resamples, alternative)
            cells = (f"{value:.3f}" if value == value else "–" for value in dataclasses.astuple(errors))
            print(f"| {kind} | {name} | {' | '.join(cells)} |", flush=True)


# -- coverage ----------------------------------------------------------------------------------------


MEANS = ("domain_specialization", "router_entropy")
QUERIES = (*MEANS, "effective_experts", "language_overlap", "mutual_information")
CASES: list[tuple[str, dict[str, Any], int, tuple[str, ...]]] = [
    *(("alike", {"effect": 0.15}, documents, MEANS) for documents in (10, 20, 200)),
    ("alike", {"effect": 0.15}, 50, QUERIES),
    ("all differ", {"all_differ": True}, 20, QUERIES),
    ("all differ", {"all_differ": True}, 50, QUERIES),
    ("alike, 64 experts", {"effect": 0.15, "experts": 64}, 50, ("language_overlap",)),
    ("all differ, 64 experts", {"all_differ": True, "experts": 64}, 50, ("language_overlap",)),
]
"""Name of the labels, arguments of their world, documents per label, queries."""


def true_sums(world: World) -> Sums:
    """Returns the expected sums, scaled to 1e9 tokens per label, as one sample."""
    tokens = 10**9
    picks_SLE = np.rint(world.truth_LE * tokens)[None]
    labels = tuple(f"label {i}" for i in range(len(world.documents)))
    tokens_SL = np.full((1, len(labels)), float(tokens))
    statistics_SLM = np.full((*tokens_SL.shape, len(STATISTICS)), np.nan)
    statistics_SLM[:, :, ENTROPY] = tokens_SL
    return Sums(
        labels=labels, tokens_SL=tokens_SL, statistics_SLM=statistics_SLM, picks_SLE=picks_SLE, top1_SLE=picks_SLE,
        weight_sum_SLE=picks_SLE,
    )  # fmt: skip


METHODS = ("ours", "percentile")


def coverage(world: World, query: str, runs: int, resamples: int) -> dict[str, tuple[float, float, float]]:
    """Returns by metric how often each of `METHODS` contains the true value, and the ratio of their mean widths."""
    asked = SampledQuery(find_query(query), {})
    exemplar = world.run(np.random.default_rng(0))
    rows = asked.answer(exemplar, true_sums(world))
    rows = rows.filter(pc.is_finite(rows["value"]))
    metrics, kept_R = np.array(rows["metric"].to_pylist()), pairs_that_differ(rows)
    truth_R = rows["value"].to_numpy()
    value = rows.column_names.index("value")
    held = {name: np.zeros(rows.num_rows) for name in METHODS}
    width = {name: np.zeros(rows.num_rows) for name in METHODS}
    for run in range(runs):
        counts = world.run(np.random.default_rng([2, run]))
        answer = rows.set_column(value, "value", pa.array(asked.values(rows, counts, whole(counts))[:, 0]))
        found, values_RS = router_intervals(
            asked, answer, counts, resamples=resamples, seed=run, level=100 * (1 - LEVEL)
        )
        ends = np.array([[found.low_R, found.high_R], np.quantile(values_RS, [LEVEL / 2, 1 - LEVEL / 2], axis=1)])
        for name, (low_R, high_R) in zip(METHODS, ends, strict=True):
            held[name] += (low_R <= truth_R) & (truth_R <= high_R)
            width[name] += high_R - low_R
    measured = {}
    for metric in dict.fromkeys(metrics):
        here_R = kept_R & (metrics == metric)
        ours, percentile = (float(held[name][here_R].mean() / runs) for name in METHODS)
        measured[metric] = ours, percentile, float(width["ours"][here_R].mean() / width["percentile"][here_R].mean())
    return measured


def pairs_that_differ(rows: pa.Table) -> NDArray[np.bool_]:
    """Selects each pair of labels once, and only if they differ; for other queries, all rows."""
    if "label_a" not in rows.column_names:
        return np.ones(rows.num_rows, bool)
    names = rows.select(["metric", "label_a", "label_b", "value"]).to_pylist()
    differ = {(row["label_a"], row["label_b"]) for row in names if row["metric"] == "jsd" and row["value"] > 1e-9}
    return np.array([(row["label_a"], row["label_b"]) in differ and row["label_a"] < row["label_b"] for row in names])


def measure_coverage(runs: int, resamples: int, asked: Sequence[str]) -> None:
    """Prints a row per case and metric."""
    print(
        f"| labels | documents | metric | {' | '.join(METHODS)} | width |\n|---|---|---|{'---|' * (len(METHODS) + 1)}"
    )
    for kind, made, documents, queries in CASES:
        world = World(documents=(documents,) * 8, **made)
        for query in (query for query in queries if query in asked):
            for metric, (ours, percentile, width) in coverage(world, query, runs, resamples).items():
                cells = f"{ours:.3f} | {percentile:.3f} | {width:.2f}"
                print(f"| {kind} | {documents} | {metric} | {cells} |", flush=True)


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--shuffles", type=int, default=2999)
    parser.add_argument("--resamples", type=int, default=400)
    parser.add_argument("--parts", nargs="+", choices=("tests", "coverage"), default=["tests", "coverage"])
    parser.add_argument("--kinds", nargs="+", choices=list(WORLDS), default=list(WORLDS), help="of runs, for tests")
    parser.add_argument("--tests", nargs="+", choices=list(TESTS), default=list(TESTS))
    parser.add_argument("--queries", nargs="+", choices=QUERIES, default=list(QUERIES), help="for coverage")
    parser.add_argument("--alternative", choices=list(SIGNED), default="greater", help="of the tests")
    arguments = parser.parse_args()
    if "tests" in arguments.parts:
        measure_tests(arguments.runs, arguments.shuffles, arguments.kinds, arguments.tests, arguments.alternative)
    if "coverage" in arguments.parts:
        measure_coverage(arguments.runs, arguments.resamples, arguments.queries)


if __name__ == "__main__":
    main()
