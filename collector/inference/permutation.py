"""Is an expert chosen more for one label than for the others? A permutation test of the documents' labels.

Null hypothesis, for every (stack, layer, expert, label): the label's domain specialization N_eD / N_D is that of the
pooled documents. The labels of documents are shuffled, so that each label keeps its number of documents. With the
residuals r = picks - pooled share x tokens of the documents, the difference DS - pooled is sum(r) / N_D, and

    t = (R_D / N_D - R_O / N_O) / sqrt(Q_D / N_D^2 + Q_O / N_O^2),    R = sum of r, Q = sum of r^2,

over the label's documents (D) and all others (O), compares the two ratios in units of the standard error of their
difference (linearised ratio estimators). Without that unit the test is right only where documents of all labels are
equally long and equally uniform; with it, it is so in large samples wherever the means agree (Chung and Romano 2013,
"Exact and asymptotically robust permutation tests", arXiv 1304.5939). Where labels say nothing at all it is exact.

p = (1 + #{shuffles with t at least as large}) / (B + 1); q is Benjamini and Hochberg's over all rows.

Guarantees: memory bounded to one router, in portions of shuffles; the same seed gives the same p.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
from scipy import sparse, stats

from collector.inference.resampling import documents_of, portions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from collector.counts import DocumentCounts

Alternative = Literal["greater", "less", "two-sided"]
_SIGNED: dict[Alternative, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "greater": lambda t: t,
    "less": np.negative,
    "two-sided": np.abs,
}
"""What is large where the alternative holds."""
_CACHED = 16
"""Portions are so much smaller than memory would allow, so that their sums stay in the processor's cache."""
_TIE = 1e-9
"""Sums in another order differ by this much less than two different sums do."""


def specialization_test(
    counts: Iterable[DocumentCounts],
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.05,
    alternative: Alternative = "greater",
) -> pa.Table:
    """Tests for every router, label and expert whether the label chooses the expert more than the others do.

    Args:
        counts: of the routers.
        resamples: shuffles of the labels.
        seed: of the shuffles.
        level: false discovery rate to keep.
        alternative: `greater`, `less` or `two-sided`.

    Returns:
        One row per (stack, layer, label, expert), the most certain first: `value` the domain specialization, `pooled`
        that of all documents together, `difference` and `lift` (value - pooled and value / pooled), `t`, `p`, `q`,
        `significant` (q <= level), `n` the label's tokens and `documents`.

    Raises:
        ValueError: resamples or level are out of range, or a router has documents of one label only.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    if not 0 < level < 1:
        raise ValueError(f"level is a false discovery rate between 0 and 1, got {level}")
    table = pa.concat_tables([_test_router(one, resamples, seed, alternative) for one in counts])
    q = stats.false_discovery_control(table["p"].to_numpy(), method="bh")
    place = table.column_names.index("p") + 1
    table = table.add_column(place, "q", pa.array(q)).add_column(place + 1, "significant", pa.array(q <= level))
    certainty = np.lexsort([-_SIGNED[alternative](table["t"].to_numpy()), q])
    return table.take(certainty)


def remark(table: pa.Table, resamples: int, level: float) -> str:
    """What the test found, and whether there were shuffles enough for it to find anything."""
    cells, found = table.num_rows, int(np.count_nonzero(table["significant"].to_numpy()))
    text = f"{found:,} of {cells:,} cells are significant at a false discovery rate of {level:g}"
    needed = int(np.ceil(cells / (level * (resamples + 1)) - _TIE))
    if needed > cells:
        fewest = int(np.ceil(1 / level - _TIE)) - 1
        return f"{text}: {resamples:,} shuffles allow none, it takes --resamples {fewest:,} at least"
    if needed > 1:
        text += (
            f"; with {resamples:,} shuffles p is {1 / (resamples + 1):.2g} at least, and {needed:,} cells must have that "
            f"before one counts: --resamples {int(np.ceil(cells / level)):,} would let a single one"
        )
    return text


def _test_router(counts: DocumentCounts, resamples: int, seed: int, alternative: Alternative) -> pa.Table:
    members = documents_of(counts)
    if len(members) < 2:
        names = ", ".join(members) or "none"
        raise ValueError(f"a label is compared with the others, which takes two labels at least; there is {names}")
    tokens_L = np.array([counts.tokens_D[documents].sum() for documents in members.values()])
    picks_LE = np.array([counts.picks_DE[documents].sum(axis=0, dtype=np.int64) for documents in members.values()])
    t_LE, p_LE = p_values(counts, resamples=resamples, seed=seed, alternative=alternative)
    value_LE = picks_LE / tokens_L[:, None]
    pooled_LE = np.broadcast_to(picks_LE.sum(axis=0) / tokens_L.sum(), value_LE.shape)
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


def studentized(sums_SLC: NDArray[np.float64]) -> NDArray[np.float64]:
    """[S, L, E] t of each label and expert, 0 where nothing varies.

    Args:
        sums_SLC: [S, L, 1 + 2 E] each label's sums of tokens, residuals and squared residuals.
    """
    n_SL1 = sums_SLC[:, :, :1]
    r_SLE, q_SLE = np.split(sums_SLC[:, :, 1:], 2, axis=2)
    others_SL1 = n_SL1.sum(axis=1, keepdims=True) - n_SL1
    rest_SLE = q_SLE.sum(axis=1, keepdims=True) - q_SLE
    # the residuals of the others sum to -r
    difference_SLE = r_SLE * (1 / n_SL1 + 1 / others_SL1)
    variance_SLE = q_SLE / n_SL1**2 + rest_SLE / others_SL1**2
    return np.divide(difference_SLE, np.sqrt(variance_SLE), out=np.zeros_like(r_SLE), where=variance_SLE > 0)


def p_values(
    counts: DocumentCounts,
    *,
    resamples: int,
    seed: int,
    alternative: Alternative = "greater",
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]] = studentized,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A statistic and its p value, [L, E] each, of the labels that have documents in this router.

    Args:
        counts: of the router.
        resamples: shuffles of the labels.
        seed: of the shuffles.
        alternative: which values of the statistic are extreme.
        statistic: from sums as `studentized` takes them.
    """
    present, label_D = np.unique(counts.label_D, return_inverse=True)
    labels, label_D = len(present), label_D.astype(np.int32)
    r_DE = residuals(counts)
    values_DC = np.concatenate([counts.tokens_D[:, None], r_DE, r_DE**2], axis=1)
    signed, rng = _SIGNED[alternative], np.random.default_rng(seed)
    t_LE = statistic(group_sums(label_D[None], values_DC, labels))[0]
    threshold_LE = signed(t_LE) - _TIE * np.abs(t_LE)
    reached_LE = np.zeros(t_LE.shape, np.int64)
    for samples in portions(resamples, max(len(label_D), _CACHED * labels * values_DC.shape[1])):
        shuffled_SD = rng.permuted(np.tile(label_D, (samples, 1)), axis=1)
        t_SLE = statistic(group_sums(shuffled_SD, values_DC, labels))
        reached_LE += (signed(t_SLE) >= threshold_LE).sum(axis=0)
    return t_LE, (1 + reached_LE) / (resamples + 1)


def residuals(counts: DocumentCounts) -> NDArray[np.float64]:
    """[D, E] picks of each document beyond the pooled share of its tokens; they sum to 0 over the documents."""
    tokens_D = counts.tokens_D.astype(np.float64)
    pooled_E = counts.picks_DE.sum(axis=0, dtype=np.float64) / tokens_D.sum()
    return counts.picks_DE - tokens_D[:, None] * pooled_E


def group_sums(label_SD: NDArray[np.integer], values_DC: NDArray[np.float64], labels: int) -> NDArray[np.float64]:
    """[S, L, C] sums of the documents' values by label, for S labellings of them.

    A product with an indicator matrix, held by columns: a document's values are read once and added to the sums of all
    samples, which stay in the processor's cache.
    """
    samples, documents = label_SD.shape
    cells_DS = (label_SD + labels * np.arange(samples, dtype=np.int32)[:, None]).T
    starts = np.arange(documents + 1, dtype=np.int64) * samples
    matrix = sparse.csc_array(
        (np.ones(cells_DS.size), np.ascontiguousarray(cells_DS).ravel(), starts), shape=(samples * labels, documents)
    )
    return (matrix @ values_DC).reshape(samples, labels, -1)
