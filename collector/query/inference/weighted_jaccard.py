"""Intervals of weighted Jaccard, where a plain bootstrap fails.

With x the use of each expert by two labels, weighted Jaccard is (1 - d) / (1 + d), where d is the sum of |z| over
experts and z = (x_a - x_b) / sum of (x_a + x_b). |z| has a kink at 0: where labels agree, noise of standard deviation s
adds 0.8 s to it, whatever its sign. A bootstrap adds its noise to values that have some already, and sees 0.33 s of
this. Over many experts the rest outweighs the spread.

How much noise adds depends on which experts agree, and documents cannot tell those from experts that nearly do. So each
end of the interval assumes what is worse for it (directional derivatives: Fang and Santos 2019, "Inference on
directionally differentiable functions", arXiv 1404.3763). With z* of a sample and Z = z* - z,

- the upper end of d is that of the basic bootstrap: d - a low quantile of sum of |z*| - |z|;
- the lower end takes experts with |z| <= sqrt(2 ln E) standard errors as agreeing: d - a high quantile of the sum of
  |Z| over these and of Z * sign(z) over the others. None of E experts that agree lies beyond that by chance (Donoho and
  Johnstone 1994, "Ideal spatial adaptation by wavelet shrinkage"). As |z + Z| - |z| <= |Z|, noise adds no more than
  that even where experts differ a little.

So the interval is long where labels are nearly alike, because documents say little there, and need not hold the value,
whose bias is known to be one-sided. Guarantee: 0 <= low <= high <= 1. Memory: 8 bytes x samples x labels x experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from collector.query.document_counts import OUTPUTS
from collector.query.inference.resampling import memberships, whole

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    from collector.query.document_counts import DocumentCounts
    from collector.query.inference.resampling import Sums

METRIC = "weighted_jaccard"
_CONTRIBUTION = [*OUTPUTS].index("contribution")


class Overlaps:
    """Use of experts by the labels of one router, in its documents and in samples of them."""

    def __init__(self, query: str, counts: DocumentCounts) -> None:
        """Takes note of the documents; `query` is the name of the query that has the metric."""
        self._of_outputs = query == "contribution_overlap"
        self._labels, use_1LE = self._use(whole(counts))
        self._use_LE = use_1LE[0]
        self._samples: list[NDArray[np.float64]] = []

    def note(self, sums: Sums) -> None:
        """Takes note of samples."""
        self._samples.append(self._use(sums)[1])

    def ends(
        self, rows: pa.Table, tail_R: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
        """Returns low and high end of R rows, and which rows have the metric; the ends of others are NaN.

        Args:
            rows: of the query's answer.
            tail_R: [R] share of samples beyond each end.
        """
        use_SLE = np.concatenate(self._samples)
        place = {label: number for number, label in enumerate(self._labels)}
        ends_R2 = np.full((rows.num_rows, 2), np.nan)
        has_R = np.array([metric == METRIC for metric in rows["metric"].to_pylist()], bool)
        found: dict[tuple[int, ...], tuple[float, float]] = {}
        for row in np.flatnonzero(has_R).tolist():
            pair = tuple(sorted(place[rows[column][row].as_py()] for column in ("label_a", "label_b")))
            if pair not in found:
                found[pair] = distance_ends(self._use_LE[[*pair]], use_SLE[:, [*pair]], float(tail_R[row]))
            ends_R2[row] = found[pair][::-1]
        return *((1 - ends_R2) / (1 + ends_R2)).T, has_R

    def _use(self, sums: Sums) -> tuple[tuple[str, ...], NDArray[np.float64]]:
        """Returns the single labels and the use of experts per token, [S, L, E]."""
        labels, has_label_KL = memberships(sums.labels)
        use_SKE = sums.outputs_OSLE[_CONTRIBUTION] if self._of_outputs else sums.picks_SLE
        use_SLE = np.einsum("ske,kl->sle", use_SKE, has_label_KL) / (sums.tokens_SL @ has_label_KL)[:, :, None]
        return tuple(labels), np.maximum(use_SLE, 0)


def distance_ends(use_2E: NDArray[np.float64], use_S2E: NDArray[np.float64], tail: float) -> tuple[float, float]:
    """Returns the ends of the interval of d = sum |x_a - x_b| / sum (x_a + x_b), within 0 … 1.

    Args:
        use_2E: use of each expert by two labels.
        use_S2E: the same in samples.
        tail: share of samples beyond each end.
    """
    z_E, z_SE = _differences(use_2E), _differences(use_S2E)
    if np.isnan(z_E).any() or np.isnan(z_SE).any():
        return np.nan, np.nan
    noise_SE = z_SE - z_E
    agree_E = np.abs(z_E) <= np.sqrt(2 * np.log(len(z_E))) * z_SE.std(axis=0, ddof=1)
    distance = np.abs(z_E).sum()
    least = np.quantile(np.abs(z_SE).sum(axis=1) - distance, tail)
    most = np.quantile(np.where(agree_E, np.abs(noise_SE), noise_SE * np.sign(z_E)).sum(axis=1), 1 - tail)
    high = float(np.clip(distance - least, 0, 1))
    return float(np.clip(distance - most, 0, high)), high


def _differences(use_x2E: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns (x_a - x_b) / sum of (x_a + x_b), of shape […, E]; NaN where neither label uses any expert."""
    with np.errstate(invalid="ignore"):
        return (use_x2E[..., 0, :] - use_x2E[..., 1, :]) / use_x2E.sum(axis=(-2, -1))[..., None]
