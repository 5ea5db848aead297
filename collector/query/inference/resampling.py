"""Draws samples of documents, and sums the counts of each sample.

Tokens of one document are correlated, so whole documents are drawn, within their label. One with several labels is
drawn once, with all of them, among the documents that have the same labels. A sample is a vector of weights over
documents (how often each was drawn, or whether it is included), and its sums are the product of that vector with the
documents' counts: one matrix product for many samples.

Guarantees: the draws of a label depend only on the seed, the label's name and its number of documents, so they are the
same in all routers and whatever other labels there are; memory is bounded by working in portions of samples. Nothing
here reads a run.

Shapes: S samples, D documents (N of one label), L labels, E experts, M statistics, O sums of outputs (0 where a query
reads none), C = 1 + M + (3 + O) E columns of counts.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import TYPE_CHECKING

import numpy as np

from collector.data.sources import LABEL_SEPARATOR
from collector.query.document_counts import document_numbers
from collector.query.inference.standardization import matched, matched_weights

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from collector.query.document_counts import DocumentCounts

_PORTION = 4_000_000
"""Numbers per array of a portion: weights [S, N], or rows [S, L, E] of sums."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sums:
    """Columns of the views that queries read of one router, for S samples of its documents (see `answers`)."""

    labels: tuple[str, ...]
    """The L recorded labels, sets of several included, that have documents in the router."""
    tokens_SL: NDArray[np.float64]
    statistics_SLM: NDArray[np.float64]
    """Sums over tokens, in the order of `STATISTICS`."""
    picks_SLE: NDArray[np.float64]
    top1_SLE: NDArray[np.float64]
    weight_sum_SLE: NDArray[np.float64]
    outputs_OSLE: Sequence[NDArray[np.float64]] = ()
    """Sums over what each expert put out, in the order of `OUTPUTS`; none if the counts have none."""

    @classmethod
    def of(cls, counts: DocumentCounts, labels: tuple[str, ...], sums_SLC: NDArray[np.float64]) -> Sums:
        """Splits the sums of `columns` into fields."""
        statistics, of_experts = np.split(sums_SLC[:, :, 1:], [len(counts.statistics)], axis=2)
        outputs = 0 if counts.outputs_ODE is None else len(counts.outputs_ODE)
        picks, top1, weight_sum, *put_out = np.split(of_experts, 3 + outputs, axis=2)
        return cls(
            labels=labels, tokens_SL=sums_SLC[:, :, 0], statistics_SLM=statistics, picks_SLE=picks, top1_SLE=top1,
            weight_sum_SLE=weight_sum, outputs_OSLE=put_out,
        )  # fmt: skip


def columns(counts: DocumentCounts) -> NDArray[np.float64]:
    """Returns tokens, statistics, picks, top-1, weights and outputs by document, [D, C]; exact up to 2^53."""
    scalars: list[NDArray] = [counts.tokens_D[:, None], counts.statistics_DM]
    blocks = [*scalars, counts.picks_DE, counts.top1_DE, counts.weight_sum_DE]
    blocks += [] if counts.outputs_ODE is None else [*counts.outputs_ODE]
    return np.concatenate(blocks, axis=1, dtype=np.float64)


def strata_of(counts: DocumentCounts) -> dict[str, NDArray[np.intp]]:
    """Returns the documents of each recorded label, or set of labels, that has any in this router."""
    members = {name: np.flatnonzero(counts.label_D == i) for i, name in enumerate(counts.labels)}
    return {name: documents for name, documents in members.items() if len(documents)}


def documents_of(counts: DocumentCounts) -> dict[str, NDArray[np.intp]]:
    """Returns the documents of each single label in this router, sorted by label; a document may have several."""
    members: dict[str, list[NDArray[np.intp]]] = {}
    for name, documents in strata_of(counts).items():
        for label in name.split(LABEL_SEPARATOR):
            members.setdefault(label, []).append(documents)
    return {label: np.sort(np.concatenate(parts)) for label, parts in sorted(members.items())}


def lengths_of(counts: DocumentCounts) -> dict[str, NDArray[np.float64]]:
    """Returns the tokens of each document that has any, by label, sorted; weighted, if labels are matched."""
    members = documents_of(counts)
    tokens_D = {label: counts.tokens_D[rows].astype(np.float64) for label, rows in members.items()}
    if counts.stratum_D is None:
        return tokens_D
    strata = len(counts.strata)
    places = {label: counts.stratum_D[rows] for label, rows in members.items()}
    totals_LG = np.array([np.bincount(places[label], tokens_D[label], strata) for label in members])
    lengths = {}
    for (label, rows), weight_G in zip(members.items(), matched_weights(totals_LG[None])[0], strict=True):
        document_D = np.unique(document_numbers(counts)[rows], return_inverse=True)[1]
        tokens_N = np.bincount(document_D, tokens_D[label] * weight_G[places[label]])
        lengths[label] = tokens_N[tokens_N > 0].astype(np.float64)
    return lengths


def memberships(strata: Iterable[str]) -> tuple[list[str], NDArray[np.float64]]:
    """Returns the single labels of strata, sorted, and whether each of the K strata has each of the L, [K, L]."""
    sets = [name.split(LABEL_SEPARATOR) for name in strata]
    labels = sorted({label for each in sets for label in each})
    return labels, np.array([[float(label in each) for label in labels] for each in sets])


def has_token_labels(counts: DocumentCounts) -> bool:
    """Whether labels are groups of tokens, so that a document has several."""
    document_D = document_numbers(counts)
    pairs = len(np.unique(document_D * len(counts.labels) + counts.label_D))
    return pairs > len(np.unique(document_D))


def require_document_labels(counts: DocumentCounts) -> None:
    """Checks that labels are those of whole documents, as shuffling and splitting them requires.

    Raises:
        ValueError: they are groups of tokens.
    """
    if has_token_labels(counts):
        raise ValueError(
            "documents have tokens of several labels here, so their labels cannot be shuffled or halved: choose labels "
            "of documents, or compare the intervals of `collector query`"
        )


def portions(samples: int, numbers: int) -> Iterator[int]:
    """Yields the sizes of portions of samples, if each sample takes at most `numbers` numbers."""
    step = max(1, _PORTION // max(1, numbers))
    for first in range(0, samples, step):
        yield min(step, samples - first)


def label_generators(labels: tuple[str, ...], seed: int) -> list[np.random.Generator]:
    """Returns a random generator for each label, independent of the other labels."""
    return [np.random.default_rng([seed, zlib.crc32(label.encode())]) for label in labels]


def draw(rng: np.random.Generator, documents: int, size: int, samples: int) -> NDArray[np.float64]:
    """Draws `size` of N documents with replacement, S times; returns how often each was drawn, of shape [S, N]."""
    drawn = rng.integers(documents, size=(samples, size)) + documents * np.arange(samples)[:, None]
    return np.bincount(drawn.ravel(), minlength=samples * documents).reshape(samples, documents).astype(np.float64)


def label_sums(
    counts: DocumentCounts,
    members: Mapping[str, NDArray[np.intp]],
    values_DC: NDArray[np.float64],
    weights_SD: Iterable[NDArray[np.float64]],
) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """Sums weighted rows of counts by label, [S, L, C].

    Args:
        counts: of one router.
        members: its rows by recorded label.
        values_DC: the numbers to sum.
        weights_SD: for each of `members` the weights of its rows in S samples.

    Returns:
        The recorded labels and their sums. If labels are matched, the single labels, and their sums in the strata that
        they share, weighted alike.
    """
    if counts.stratum_D is None:
        sums = [weights @ values_DC[rows] for rows, weights in zip(members.values(), weights_SD, strict=True)]
        return tuple(members), np.stack(sums, axis=1)
    sums_KSGC = []
    for rows, weights in zip(members.values(), weights_SD, strict=True):
        sums_SGC = np.zeros((len(weights), len(counts.strata), values_DC.shape[1]))
        for stratum in np.unique(counts.stratum_D[rows]).tolist():
            own = counts.stratum_D[rows] == stratum
            sums_SGC[:, stratum] = weights[:, own] @ values_DC[rows[own]]
        sums_KSGC.append(sums_SGC)
    labels, has_label_KL = memberships(members)
    return tuple(labels), matched(np.einsum("ksgc,kl->slgc", np.array(sums_KSGC), has_label_KL))


def rows_per_label(counts: DocumentCounts) -> int:
    """Returns how many sums of each label `label_sums` holds: one for each stratum, if labels are matched."""
    return max(1, len(counts.strata))


def whole(counts: DocumentCounts) -> Sums:
    """Returns the sums of all documents, as one sample."""
    members = strata_of(counts)
    ones = [np.ones((1, len(rows))) for rows in members.values()]
    return Sums.of(counts, *label_sums(counts, members, columns(counts), ones))


def bootstrap(
    counts: DocumentCounts, *, resamples: int, seed: int, size: int | None = None, left_out: int = 0
) -> Iterator[Sums]:
    """Yields the sums of bootstrap samples, with each label's documents drawn with replacement.

    If labels are groups of tokens, a document has several labels: then all documents are drawn together, each with all
    its rows.

    Args:
        counts: of one router.
        resamples: number of samples.
        seed: of the draws.
        size: documents drawn for each label (default: as many as it has).
        left_out: how many documents fewer are drawn than a label has, but at least one.

    Yields:
        The samples in portions.
    """
    members, values_DC = strata_of(counts), columns(counts)
    together = has_token_labels(counts)
    document_D = document_numbers(counts)
    # Rows of the same document are drawn together: number the documents that are drawn from, by label or in all.
    own = [document_D[rows] if together else np.unique(document_D[rows], return_inverse=True)[1]
           for rows in members.values()]  # fmt: skip
    documents = [int(document_D.max() if together else numbers.max()) + 1 for numbers in own]
    rngs = label_generators(("",) if together else tuple(members), seed)
    sizes = [size or max(n - left_out, 1) for n in documents]
    largest = max(*sizes, *documents, *map(len, own))
    for samples in portions(resamples, max(largest, len(own) * counts.n_experts * rows_per_label(counts))):
        if together:
            drawn_SN = [draw(rngs[0], documents[0], sizes[0], samples)] * len(own)
        else:
            drawn_SN = [draw(*each, samples) for each in zip(rngs, documents, sizes, strict=True)]
        weights = (
            drawn if len(numbers) == drawn.shape[1] and not together else drawn[:, numbers]
            for drawn, numbers in zip(drawn_SN, own, strict=True)
        )
        yield Sums.of(counts, *label_sums(counts, members, values_DC, weights))
