"""Tests whether a label chooses an expert more than the other labels do, by permuting the labels of documents.

The null hypothesis, for every (stack, layer, expert, label): the label's domain specialization N_eD / N_D equals that
of the other documents, and so that of all documents pooled. The labels of documents are shuffled, so that each label
keeps its number of documents; a document with several labels passes all of them on together. The statistic is the
difference of the two ratios in units of its standard error,

    t = (DS_D - DS_O) / sqrt(V_D + V_O),    V = m / (m - 1) * sum of (picks - DS * tokens)^2 / N^2,

over the m documents of the label (D) and those of all others (O): the linearised variance of a ratio of sums. Without
the standard error the test is valid only if documents of all labels are equally long and equally uniform; with it, it
is valid in large samples whenever the ratios agree (Chung and Romano 2013, "Exact and asymptotically robust permutation
tests", arXiv 1304.5939). If labels carry no information about documents at all, it is exact.

The p of the shuffles is (1 + shuffles with t at least as large) / (shuffles + 1). Large samples are more than a few
documents, or documents of which few decide: where labels differ in spread, one-sided p of the shuffles are then too
small. p is the larger of this one and of Student's t for the label's own documents (`student`), so it is valid where
either is. A label with a single document has p = 1. q is Benjamini and Hochberg's over all rows.

Guarantees: memory is bounded by one router and a portion of shuffles; the same seed gives the same p.
Shapes: S shuffles, D documents, L labels, E experts, C = 2 + 3 E columns of moments.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
from scipy import sparse, stats

from collector.query.inference.resampling import documents_of, memberships, portions, require_document_labels, strata_of
from collector.query.inference.standardization import with_expected
from collector.query.inference.student import t_tails

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from collector.query.document_counts import DocumentCounts

Alternative = Literal["greater", "less", "two-sided"]
SIGNED: dict[Alternative, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "greater": lambda t: t,
    "less": np.negative,
    "two-sided": np.abs,
}
"""Transforms t so that it is large where the alternative holds."""
_CACHED = 16
"""Factor by which portions are smaller than memory would allow, so that their sums stay in the processor's cache."""
_TIE = 1e-9
"""Relative tolerance for sums that are added in another order."""
_ROUNDING = 1e-12


def specialization_test(
    counts: Iterable[DocumentCounts],
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.05,
    alternative: Alternative = "greater",
) -> pa.Table:
    """Tests for every router, label and expert whether the label chooses the expert more than the other labels do.

    Args:
        counts: of the routers.
        resamples: shuffles of the labels.
        seed: of the shuffles.
        level: false discovery rate to keep.
        alternative: `greater`, `less` or `two-sided`.

    Returns:
        One row per (stack, layer, label, expert), the most certain first: `value` the domain specialization, `pooled`
        that of all documents together (if labels are matched, in the label's mix of strata), `difference` and `lift`
        (value - pooled and value / pooled), `t`, `p`, `q`, `significant` (q <= level), `n` the label's tokens and
        `documents`.

    Raises:
        ValueError: resamples or level are out of range, there are no tokens, a router has documents of one label only,
            or documents have tokens of several labels.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    if not 0 < level < 1:
        raise ValueError(f"level is a false discovery rate between 0 and 1, got {level}")
    by_document = (one if one.stratum_D is None else with_expected(one) for one in counts)
    tables = [_test_router(one, resamples, seed, alternative) for one in by_document]
    if not tables:
        raise ValueError("there is nothing to test: no router has a token to count")
    table = pa.concat_tables(tables)
    q = stats.false_discovery_control(table["p"].to_numpy(), method="bh")
    place = table.column_names.index("p") + 1
    table = table.add_column(place, "q", pa.array(q)).add_column(place + 1, "significant", pa.array(q <= level))
    certainty = np.lexsort([-SIGNED[alternative](table["t"].to_numpy()), q])
    return table.take(certainty)


def remark(table: pa.Table, resamples: int, level: float) -> str:
    """Summarizes the test, and says what it could not find: with so many shuffles, or in labels of one document."""
    cells, found = table.num_rows, int(np.count_nonzero(table["significant"].to_numpy()))
    text = f"{found:,} of {cells:,} cells are significant at a false discovery rate of {level:g}"
    if single := int(np.count_nonzero(table["documents"].to_numpy() == 1)):
        text += f"; {single:,} are of labels with a single document, which says nothing of the next one: their p is 1"
    needed = int(np.ceil(cells / (level * (resamples + 1)) - _TIE))
    if needed > cells:
        fewest = int(np.ceil(1 / level - _TIE)) - 1
        return f"{text}: {resamples:,} shuffles allow none, it takes --resamples {fewest:,} at least"
    if needed > 1:
        text += (
            f"; with {resamples:,} shuffles p is {1 / (resamples + 1):.2g} at least, and {needed:,} cells must have "
            f"that before one counts: --resamples {int(np.ceil(cells / level)):,} would let a single one"
        )
    return text


def _test_router(counts: DocumentCounts, resamples: int, seed: int, alternative: Alternative) -> pa.Table:
    require_document_labels(counts)
    members = documents_of(counts)
    if len(members) < 2:
        names = ", ".join(members) or "none"
        raise ValueError(f"a label is compared with the others, which takes two labels at least; there is {names}")
    tokens_L = np.array([counts.tokens_D[documents].sum() for documents in members.values()])
    picks_LE = np.array([counts.picks_DE[documents].sum(axis=0, dtype=np.int64) for documents in members.values()])
    t_LE, p_LE = larger_p_values(counts, resamples=resamples, seed=seed, alternative=alternative)
    value_LE = picks_LE / tokens_L[:, None]
    expected_DE = expected_picks(counts)
    pooled_LE = np.array([expected_DE[documents].sum(axis=0) for documents in members.values()]) / tokens_L[:, None]
    lift_LE = np.divide(value_LE, pooled_LE, out=np.full(value_LE.shape, np.nan), where=pooled_LE > 0)
    labels, experts = value_LE.shape
    columns = {
        "metric": np.full(value_LE.size, "domain_specialization"),
        "stack": np.full(value_LE.size, counts.stack),
        "layer": np.full(value_LE.size, counts.layer),
        "label": np.repeat(list(members), experts),
        "expert": np.tile(np.arange(experts), labels),
        "value": value_LE.ravel(),
        "pooled": pooled_LE.ravel(),
        "difference": (value_LE - pooled_LE).ravel(),
        "lift": pa.array(lift_LE.ravel(), from_pandas=True),
        "t": t_LE.ravel(),
        "p": p_LE.ravel(),
        "n": np.repeat(tokens_L, experts),
        "documents": np.repeat([len(documents) for documents in members.values()], experts),
    }
    return pa.table(columns)


def larger_p_values(
    counts: DocumentCounts, *, resamples: int, seed: int, alternative: Alternative = "greater"
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns t, and the larger p of the shuffles and of Student's t, [L, E] each; arguments as for `p_values`."""
    t_LE, p_LE = p_values(counts, resamples=resamples, seed=seed, alternative=alternative)
    less_LE, greater_LE = t_tails(counts, expected_picks(counts))
    student_LE = {
        "greater": greater_LE, "less": less_LE, "two-sided": np.minimum(2 * np.minimum(less_LE, greater_LE), 1),
    }[alternative]  # fmt: skip
    return t_LE, np.maximum(p_LE, student_LE)


def moments(counts: DocumentCounts) -> NDArray[np.float64]:
    """Returns for each document tokens, tokens^2, and by expert r, r^2 and r * tokens, of shape [D, C].

    r are its picks minus those expected of its tokens. They give the same differences as picks, and smaller sums.
    """
    tokens_D1 = counts.tokens_D[:, None].astype(np.float64)
    r_DE = counts.picks_DE - expected_picks(counts)
    return np.concatenate([tokens_D1, tokens_D1**2, r_DE, r_DE**2, r_DE * tokens_D1], axis=1)


def expected_picks(counts: DocumentCounts) -> NDArray[np.float64]:
    """Returns the picks that the pooled share of each expert lets expect of a document, or its strata do, [D, E]."""
    if counts.expected_DE is not None:
        return counts.expected_DE
    return counts.tokens_D[:, None] * (counts.picks_DE.sum(axis=0, dtype=np.float64) / counts.tokens_D.sum())


def studentized(
    sums_SLC: NDArray[np.float64], documents_L: NDArray[np.integer],
    whole: tuple[NDArray[np.float64], int] | None = None,
) -> NDArray[np.float64]:  # fmt: skip
    """Returns t of each label and expert, of shape [S, L, E]; 0 where nothing varies.

    Args:
        sums_SLC: sums of the moments over each label's documents.
        documents_L: number of documents of each label.
        whole: sums [C] over all documents, and their number, where documents have several labels (default: all labels
            together).
    """
    total_C, documents = (sums_SLC.sum(axis=1, keepdims=True), documents_L.sum()) if whole is None else whole
    excess_SLE, variance_SLE = _ratio(sums_SLC, documents_L)
    others_excess_SLE, others_variance_SLE = _ratio(total_C - sums_SLC, documents - documents_L)
    error_SLE = np.sqrt(variance_SLE + others_variance_SLE)
    return np.divide(excess_SLE - others_excess_SLE, error_SLE, out=np.zeros_like(error_SLE), where=error_SLE > 0)


def _ratio(
    sums_SLC: NDArray[np.float64], documents_L: NDArray[np.integer]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns DS - pooled share, and its variance, for groups of documents."""
    n_SL1, nn_SL1 = sums_SLC[:, :, :1], sums_SLC[:, :, 1:2]
    r_SLE, rr_SLE, rn_SLE = np.split(sums_SLC[:, :, 2:], 3, axis=2)
    excess_SLE = r_SLE / n_SL1
    squares_SLE = rr_SLE - 2 * excess_SLE * rn_SLE + excess_SLE**2 * nn_SL1
    squares_SLE = np.maximum(squares_SLE, _ROUNDING * rr_SLE)  # rounding error, if all documents agree
    correction_L1 = (documents_L / np.maximum(documents_L - 1, 1))[:, None]
    return excess_SLE, correction_L1 * squares_SLE / n_SL1**2


def p_values(
    counts: DocumentCounts,
    *,
    resamples: int,
    seed: int,
    alternative: Alternative = "greater",
    statistic: Callable[..., NDArray[np.float64]] = studentized,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns a statistic and its p value, [L, E] each, for the labels that have documents in this router.

    Args:
        counts: of the router.
        resamples: shuffles of the labels.
        seed: of the shuffles.
        alternative: which values of the statistic are extreme.
        statistic: function of the same arguments as `studentized`.
    """
    strata, values_DC = strata_of(counts), moments(counts)
    stratum_D = np.empty(len(counts.label_D), np.int32)
    for number, documents in enumerate(strata.values()):
        stratum_D[documents] = number
    documents_L = np.array([len(documents) for documents in strata.values()])
    labels, has_label_KL = memberships(strata)
    several = len(labels) < has_label_KL.sum()
    if several:
        documents_L = (documents_L @ has_label_KL).astype(np.int64)
        statistic = functools.partial(statistic, whole=(values_DC.sum(axis=0), len(stratum_D)))

    def statistics(stratum_SD: NDArray[np.integer]) -> NDArray[np.float64]:
        sums_SKC = group_sums(stratum_SD, values_DC, len(strata))
        return statistic(np.einsum("skc,kl->slc", sums_SKC, has_label_KL) if several else sums_SKC, documents_L)

    signed, rng = SIGNED[alternative], np.random.default_rng(seed)
    t_LE = statistics(stratum_D[None])[0]
    threshold_LE = signed(t_LE) - _TIE * np.abs(t_LE)
    reached_LE = np.zeros(t_LE.shape, np.int64)
    for samples in portions(resamples, max(len(stratum_D), _CACHED * len(strata) * values_DC.shape[1])):
        t_SLE = statistics(rng.permuted(np.tile(stratum_D, (samples, 1)), axis=1))
        reached_LE += (signed(t_SLE) >= threshold_LE).sum(axis=0)
    return t_LE, (1 + reached_LE) / (resamples + 1)


def group_sums(label_SD: NDArray[np.integer], values_DC: NDArray[np.float64], labels: int) -> NDArray[np.float64]:
    """Sums the documents' values by label, for S labellings, into shape [S, L, C].

    This is a product with an indicator matrix in column format: a document's values are read once and added to the sums
    of all samples, which stay in the processor's cache.
    """
    samples, documents = label_SD.shape
    cells_DS = (label_SD + labels * np.arange(samples, dtype=np.int32)[:, None]).T
    starts = np.arange(documents + 1, dtype=np.int64) * samples
    matrix = sparse.csc_array(
        (np.ones(cells_DS.size), np.ascontiguousarray(cells_DS).ravel(), starts), shape=(samples * labels, documents)
    )
    return (matrix @ values_DC).reshape(samples, labels, -1)
