"""Measures how well the routing of a document tells its label, by a linear probe over held-out documents.

A document's signature is the shares of its picks that each expert got: of one router, or of all of them one after
another. Multinomial logistic regression, over columns scaled to unit variance and with an L2 penalty (C = 1), predicts
the label of each document after being fitted to documents of other folds; folds are stratified by label.

Two baselines stand beside it. The same probe where labels were shuffled over documents gives what chance does. A probe
that sees only how long a document is, the logarithm of its tokens and the square of that, gives what lengths tell by
themselves: signatures know them too, because those of short documents have fewer and larger shares.

Shapes: D documents, E experts, F columns of a probe.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from collector.data.sources import LABEL_SEPARATOR
from collector.query.inference.resampling import require_document_labels

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from collector.query.document_counts import DocumentCounts

_MOST = 5000
"""Documents that are probed; of more a sample is, with the labels' shares."""
_SHUFFLED, _SHUFFLES = 2000, 20
"""Documents that shuffles predict in all, so that chance is known to about a percent, and most shuffles."""
_SCHEMA = pa.schema(
    {
        "metric": pa.string(), "stack": pa.string(), "layer": pa.int64(), "value": pa.float64(),
        "baseline": pa.float64(), "length_alone": pa.float64(), "n": pa.int64(), "labels": pa.int64(),
        "documents": pa.int64(), "folds": pa.int64(),
    }
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Texts:
    """The documents of a probe."""

    document_D: NDArray[np.int64]
    """Shard and number, ascending."""
    label_D: NDArray[np.int64]
    tokens_D: NDArray[np.int64]


def label_probe(counts: Iterable[DocumentCounts], *, folds: int = 5, seed: int = 0) -> pa.Table:
    """Predicts the labels of held-out documents from their signatures, router by router and from all together.

    Args:
        counts: of the routers.
        folds: parts into which the documents are divided; each is predicted by a fit to the others.
        seed: of the folds, the shuffles and the sample of a large run.

    Returns:
        Two rows for each (stack, layer), and for all routers together (both null) if there are several: `metric` is
        `accuracy` or `balanced_accuracy`, the mean over the labels of the share of their documents that are predicted
        right; `value`, its `baseline` with shuffled labels, and `length_alone`, that of a probe of the number of
        tokens; `n` documents with `labels` labels, `documents` of the one with the fewest; `folds`.

    Raises:
        ValueError: scikit-learn is missing, there are fewer than two folds, two labels, or as many documents of a label
            as folds; labels are groups of tokens, or documents have several.
    """
    _require_package()
    if folds < 2:
        raise ValueError(f"folds must be at least 2, got {folds}")
    texts, probes = _columns(counts, folds, seed)
    if len(probes) > 1:
        probes.append((None, None, np.concatenate([share_DE for *_, share_DE in probes], axis=1)))
    rng = np.random.default_rng(seed)
    shuffles = min(_SHUFFLES, -(-_SHUFFLED // len(texts.label_D)))
    shuffled_SD = [rng.permutation(texts.label_D) for _ in range(shuffles)]
    log_D = np.log(texts.tokens_D)
    length = _held_out(np.column_stack([log_D, log_D**2]), texts.label_D, folds, seed)
    sizes = np.bincount(texts.label_D)
    given = {"n": len(texts.label_D), "labels": len(sizes), "documents": int(sizes.min()), "folds": folds}
    rows = []
    for stack, layer, share_DF in probes:
        found = _held_out(share_DF, texts.label_D, folds, seed)
        chance = [_held_out(share_DF, label_D, folds, seed) for label_D in shuffled_SD]
        for metric, value in found.items():
            baseline = float(np.mean([each[metric] for each in chance]))
            beside = {"value": value, "baseline": baseline, "length_alone": length[metric]}
            rows.append({"metric": metric, "stack": stack, "layer": layer} | beside | given)
    rows.sort(key=lambda row: str(row["metric"]))
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def _columns(
    counts: Iterable[DocumentCounts], folds: int, seed: int
) -> tuple[_Texts, list[tuple[str | None, int | None, NDArray[np.float32]]]]:
    """Returns the documents, and the stack, the layer and the signatures of each router."""
    texts: _Texts | None = None
    probes: list[tuple[str | None, int | None, NDArray[np.float32]]] = []
    for one in counts:
        require_document_labels(one)
        if one.stratum_D is not None:
            raise ValueError("a probe sees whole documents, which are divided here into strata: ask without --match")
        texts = texts or _choose(one, folds, seed)
        probes.append((one.stack, one.layer, _signatures(one, texts.document_D)))
    if texts is None:
        raise ValueError("there is nothing to probe: no router has a token to count")
    return texts, probes


def _require_package() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ValueError("The probe needs scikit-learn: pip install 'moe-routing-collector[probe]'") from error


def _choose(counts: DocumentCounts, folds: int, seed: int) -> _Texts:
    """Returns the documents to probe, which are those of the first router.

    Raises:
        ValueError: there are too few, or they have several labels.
    """
    label_D, sizes = np.unique(counts.label_D, return_inverse=True)[1], np.unique(counts.label_D, return_counts=True)
    names = [counts.labels[label] for label in sizes[0]]
    if any(LABEL_SEPARATOR in name for name in names):
        raise ValueError("documents have several labels here, and a probe predicts a single one: choose a grouping "
                         "of documents with --by")  # fmt: skip
    if len(names) < 2:
        raise ValueError(f"a probe tells labels apart, which takes two at least; there is {names[0]}")
    few = [name for name, size in zip(names, sizes[1], strict=True) if size < folds]
    if few:
        raise ValueError(
            f"{len(few)} labels have fewer than {folds} documents, first {few[0]}, and each fold takes one of each: "
            "choose others with --labels, or fewer --folds"
        )
    rng, kept = np.random.default_rng(seed), []
    for label, size in enumerate(sizes[1].tolist()):
        wanted = size if len(label_D) <= _MOST else max(folds, size * _MOST // len(label_D))
        kept.append(rng.permutation(np.flatnonzero(label_D == label))[:wanted])
    place = np.sort(np.concatenate(kept))
    return _Texts(document_D=_numbers(counts)[place], label_D=label_D[place], tokens_D=counts.tokens_D[place])


def _numbers(counts: DocumentCounts) -> NDArray[np.int64]:
    """Returns shard and number of each document as one, ascending as the counts are, [D]."""
    return counts.shard_D << 32 | counts.doc_D


def _signatures(counts: DocumentCounts, document_D: NDArray[np.int64]) -> NDArray[np.float32]:
    """Returns the shares of the documents' picks, [D, E]; 0 for a document of which the router saw no token."""
    known = _numbers(counts)
    place_D = np.minimum(np.searchsorted(known, document_D), len(known) - 1)
    share_DE = counts.picks_DE[place_D] / (counts.top_k * counts.tokens_D[place_D, None])
    return np.where((known[place_D] == document_D)[:, None], share_DE, 0).astype(np.float32)


def _held_out(
    column_DF: NDArray[np.floating], label_D: NDArray[np.int64], folds: int, seed: int
) -> dict[str, float]:  # fmt: skip
    """Returns the metrics of labels that are predicted by fits to the other folds."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, balanced_accuracy_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=1000))
    parts = StratifiedKFold(folds, shuffle=True, random_state=seed)
    with threadpool_limits(1):  # each step of a fit is too small for several threads
        predicted_D = cross_val_predict(probe, column_DF, label_D, cv=parts)
    return {
        "accuracy": float(accuracy_score(label_D, predicted_D)),
        "balanced_accuracy": float(balanced_accuracy_score(label_D, predicted_D)),
    }
