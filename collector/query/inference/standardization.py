"""Standardizes counts of labels by stratum, so that labels with another mix of tokens or documents compare.

Direct: each label's sums are weighted so that all labels have the same mix of strata. `matched` does to samples of
documents what `queries/macros/stratum_weights.sql` does to a run.

Indirect: the picks of each document are compared with those expected of its mix of strata, if the tokens of a stratum
chose as those of all documents together do. Observed minus expected, summed over a label's documents, is the numerator
of the test of Mantel and Haenszel (1959, "Statistical aspects of the analysis of data from retrospective studies of
disease").

Shapes: S samples, L labels, G strata, D rows of counts, C columns of counts (see `resampling`), E experts.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from collector.query.document_counts import DocumentCounts


def matched(sums_SLGC: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums over strata, each weighted alike in all labels, into shape [S, L, C].

    Args:
        sums_SLGC: sums over the documents of each label and stratum; the first column counts tokens.
    """
    return np.einsum("slgc,slg->slc", sums_SLGC, matched_weights(sums_SLGC[:, :, :, 0]))


def matched_weights(tokens_SLG: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the weight of a token of each label and stratum, [S, L, G]: least / tokens, with least over the labels.

    It is 0 in a stratum that any label lacks.
    """
    least_S1G = tokens_SLG.min(axis=1, keepdims=True)
    return np.divide(least_S1G, tokens_SLG, out=np.zeros_like(tokens_SLG), where=tokens_SLG > 0)


def with_expected(counts: DocumentCounts) -> DocumentCounts:
    """Sums a document's strata, and adds the picks that these let expect of it.

    Args:
        counts: of one router, by document and stratum.

    Returns:
        One row per document and label, without the tokens of strata that a single label has; `expected_DE` = sum over
        strata g of the document's tokens in g times the share of all documents' tokens in g that choose e.
    """
    assert counts.stratum_D is not None, "the counts are by stratum"
    pairs_N2 = np.unique(np.stack([counts.stratum_D, counts.label_D]), axis=1)
    labels_G = np.bincount(pairs_N2[0], minlength=len(counts.strata))
    counts = counts.of(labels_G[counts.stratum_D] > 1)
    assert counts.stratum_D is not None
    tokens_D1 = counts.tokens_D[:, None].astype(np.float64)
    totals_GC = _grouped(np.hstack([tokens_D1, counts.picks_DE]), counts.stratum_D, len(counts.strata))
    share_GE = totals_GC[:, 1:] / np.maximum(totals_GC[:, :1], 1)
    names = np.stack([counts.shard_D, counts.doc_D, counts.label_D])
    (shard_D, doc_D, label_D), row_D = np.unique(names, axis=1, return_inverse=True)

    def by_document(values: NDArray) -> NDArray:
        return _grouped(values, row_D.ravel(), len(doc_D)).astype(values.dtype)

    return dataclasses.replace(
        counts, shard_D=shard_D, doc_D=doc_D, label_D=label_D, tokens_D=by_document(counts.tokens_D),
        statistics_DM=by_document(counts.statistics_DM), picks_DE=by_document(counts.picks_DE),
        top1_DE=by_document(counts.top1_DE), weight_sum_DE=by_document(counts.weight_sum_DE), outputs_ODE=None,
        strata=(), stratum_D=None, expected_DE=by_document(tokens_D1 * share_GE[counts.stratum_D]),
    )  # fmt: skip


def _grouped(values: NDArray, group_D: NDArray[np.integer], groups: int) -> NDArray[np.float64]:
    """Sums rows by group, into shape [groups, …]."""
    summed = np.zeros((groups, *values.shape[1:]))
    np.add.at(summed, group_D, values)
    return summed
