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
from collector.query.document_counts import document_numbers
from collector.query.inference.resampling import (
    label_generators,
    label_sums,
    lengths_of,
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
    lengths = {label: len(tokens_N) for label, tokens_N in lengths_of(counts).items()}
    members = {label: documents for label, documents in lengths.items() if documents > 1}
    if not members:
        return
    strata = {name: each for name, each in strata_of(counts).items() if set(name.split(LABEL_SEPARATOR)) & set(members)}
    shares, differences = [], []
    for names, sums_SKC in _halves(counts, strata, splits, seed):
        labels, has_label_KL = memberships(names)
        sums_SLC = np.einsum("skc,kl->slc", sums_SKC, has_label_KL[:, [label in members for label in labels]])
        pooled_SC = sums_SKC.sum(axis=1, keepdims=True)
        shares.append(sums_SLC[:, :, 1:] / sums_SLC[:, :, :1])
        differences.append(shares[-1] - pooled_SC[:, :, 1:] / pooled_SC[:, :, :1])
    fewest = min(members.values())
    for metric, (first_SLE, second_SLE) in (("domain_specialization", shares), ("difference", differences)):
        where = {"metric": metric, "stack": counts.stack, "layer": counts.layer}
        yield where | {"label": None, "documents": fewest} | _agreement(first_SLE, second_SLE)
        for place, (label, documents) in enumerate(members.items()):
            agreement = _agreement(first_SLE[:, place], second_SLE[:, place])
            yield where | {"label": label, "documents": documents} | agreement


def _halves(
    counts: DocumentCounts, strata: Mapping[str, NDArray[np.intp]], splits: int, seed: int
) -> list[tuple[tuple[str, ...], NDArray[np.float64]]]:
    """Returns labels, and tokens and picks of each, [S, K, 1 + E], of the two halves of all documents, in S splits."""
    values_DC = np.column_stack([counts.tokens_D, counts.picks_DE]).astype(np.float64)
    several = any(LABEL_SEPARATOR in name for name in strata)
    # Rows of the same document go to the same half.
    own = [np.unique(document_numbers(counts)[rows], return_inverse=True)[1] for rows in strata.values()]
    documents = [int(numbers.max()) + 1 for numbers in own]
    # Where labels have documents in many small strata, the odd ones go to either half in turn.
    most = [n // 2 + (n % 2 if several and place % 2 else 0) for place, n in enumerate(documents)]
    rngs = label_generators(tuple(strata), seed)
    labels: tuple[str, ...] = ()
    halves: tuple[list[NDArray[np.float64]], list[NDArray[np.float64]]] = ([], [])
    for samples in portions(splits, sum(map(len, own))):
        first_SN = [
            rng.permuted(np.tile(np.arange(n) < half, (samples, 1)), axis=1)
            for rng, n, half in zip(rngs, documents, most, strict=True)
        ]
        for half, is_first in zip(halves, (True, False), strict=True):
            rows_SN = ((each[:, numbers] == is_first).astype(np.float64)
                       for each, numbers in zip(first_SN, own, strict=True))  # fmt: skip
            labels, sums_SKC = label_sums(counts, strata, values_DC, rows_SN)
            half.append(sums_SKC)
    return [(labels, np.concatenate(half)) for half in halves]


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
