"""Measures how reproducible specialization is: split-half reliability.

The documents of each label are split into random halves, many times. The values of one half are correlated with those
of the other over all cells (label, expert) of a router. `domain_specialization` correlates the values themselves, which
agree between halves merely because some experts are popular with every label; `difference` correlates value - pooled
share of the same half, which agrees only if labels differ.

A half has only half of the documents: the Spearman-Brown formula 2 r / (1 + r) estimates the correlation between two
sets of documents as large as the whole.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from scipy import stats

from collector.data.sources import LABEL_SEPARATOR
from collector.query.inference.resampling import (
    documents_of,
    label_generators,
    memberships,
    portions,
    require_document_labels,
    strata_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from numpy.typing import NDArray

    from collector.query.document_counts import DocumentCounts

_SCHEMA = pa.schema(
    {
        "metric": pa.string(), "stack": pa.string(), "layer": pa.int64(), "label": pa.string(), "value": pa.float64(),
        "low": pa.float64(), "high": pa.float64(), "spearman": pa.float64(), "spearman_brown": pa.float64(),
        "documents": pa.int64(), "splits": pa.int64(),
    }
)  # fmt: skip


def split_half(counts: Iterable[DocumentCounts], *, splits: int = 200, seed: int = 0) -> pa.Table:
    """Correlates random halves of each label's documents.

    Args:
        counts: of the routers.
        splits: number of random splits.
        seed: of the splits.

    Returns:
        Two rows for each (stack, layer) and label, and for all labels together (`label` null): `metric` is
        `domain_specialization` or `difference`; `value` is Pearson's correlation over the cells, averaged over splits;
        95 % of the splits lie between `low` and `high`; `spearman` is the mean rank correlation; `spearman_brown` is
        the value extrapolated to all documents; `documents` (of the label with the fewest), `splits`. Labels with a
        single document are left out. Values are null where nothing varies.

    Raises:
        ValueError: splits is below 1.
    """
    if splits < 1:
        raise ValueError(f"splits must be at least 1, got {splits}")
    rows = [row for one in counts for row in _of_router(one, splits, seed)]
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def _of_router(counts: DocumentCounts, splits: int, seed: int) -> Iterator[dict[str, object]]:
    require_document_labels(counts)
    documents_by_label = documents_of(counts)
    members = {label: documents for label, documents in documents_by_label.items() if len(documents) > 1}
    if not members:
        return
    strata = {name: each for name, each in strata_of(counts).items() if set(name.split(LABEL_SEPARATOR)) & set(members)}
    labels, has_label_KL = memberships(strata)
    has_label_KL = has_label_KL[:, [label in members for label in labels]]
    halves = _halves(counts, strata, splits, seed)
    shares, differences = [], []
    for tokens_SK1, picks_SKE in halves:
        tokens_SL1, picks_SLE = (np.einsum("ske,kl->sle", each, has_label_KL) for each in (tokens_SK1, picks_SKE))
        pooled_S1E = picks_SKE.sum(axis=1, keepdims=True) / tokens_SK1.sum(axis=1, keepdims=True)
        shares.append(picks_SLE / tokens_SL1)
        differences.append(shares[-1] - pooled_S1E)
    fewest = min(map(len, members.values()))
    for metric, (first_SLE, second_SLE) in (("domain_specialization", shares), ("difference", differences)):
        where = {"metric": metric, "stack": counts.stack, "layer": counts.layer}
        yield where | {"label": None, "documents": fewest} | _agreement(first_SLE, second_SLE)
        for place, (label, documents) in enumerate(members.items()):
            agreement = _agreement(first_SLE[:, place], second_SLE[:, place])
            yield where | {"label": label, "documents": len(documents)} | agreement


def _halves(
    counts: DocumentCounts, strata: Mapping[str, NDArray[np.intp]], splits: int, seed: int
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Returns tokens [S, K, 1] and picks [S, K, E] of the two halves of each of K strata, in S splits."""
    values_DC = np.column_stack([counts.tokens_D, counts.picks_DE]).astype(np.float64)
    first_SKC = np.empty((splits, len(strata), values_DC.shape[1]))
    total_KC = np.array([values_DC[documents].sum(axis=0) for documents in strata.values()])
    several = any(LABEL_SEPARATOR in name for name in strata)
    for place, (documents, rng) in enumerate(zip(strata.values(), label_generators(tuple(strata), seed), strict=True)):
        # Where labels have documents in many small strata, the odd ones go to either half in turn.
        most = len(documents) // 2 + (len(documents) % 2 if several and place % 2 else 0)
        half_N = (np.arange(len(documents)) < most).astype(np.float64)
        done = 0
        for samples in portions(splits, len(documents)):
            drawn_SN = rng.permuted(np.tile(half_N, (samples, 1)), axis=1)
            first_SKC[done : done + samples, place] = drawn_SN @ values_DC[documents]
            done += samples
    return [(half_SKC[:, :, :1], half_SKC[:, :, 1:]) for half_SKC in (first_SKC, total_KC - first_SKC)]


def _agreement(first: NDArray[np.float64], second: NDArray[np.float64]) -> dict[str, object]:
    """Summarizes the correlations of two arrays [S, …] of cells, sample by sample."""
    first_SC, second_SC = (each.reshape(len(each), -1) for each in (first, second))
    pearson_S = _pearson(first_SC, second_SC)
    spearman_S = _pearson(stats.rankdata(first_SC, axis=1), stats.rankdata(second_SC, axis=1))
    low, high = np.quantile(pearson_S, [0.025, 0.975])
    value = pearson_S.mean()
    found: dict[str, float] = {
        "value": value, "low": low, "high": high, "spearman": spearman_S.mean(),
        "spearman_brown": 2 * value / (1 + value) if value > -1 else np.nan,
    }  # fmt: skip
    known = {name: None if np.isnan(each) else float(each) for name, each in found.items()}
    return {**known, "splits": len(pearson_S)}


def _pearson(first_SC: NDArray[np.float64], second_SC: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the correlations, of shape [S]; NaN where one side does not vary, or has a single cell."""
    if first_SC.shape[1] < 2:
        return np.full(len(first_SC), np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        return stats.pearsonr(first_SC, second_SC, axis=1).statistic
