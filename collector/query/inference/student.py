"""Student's t test of a label's share against that of the other documents, where labels differ in spread.

Shuffled labels show how far apart two shares are if documents of all labels are equally long and equally varied. Where
they are not, the shuffles answer another question, and with few documents a standard error does not make up for it. So
`collector test` also compares with Student's t, for which a label's own documents alone say how much its share varies:

    t = (DS_D - DS_O) / sqrt(W_D + W_O)    with Welch's degrees of freedom (Satterthwaite 1946, Welch 1947).

- Variance. A document of n tokens adds e = picks - share * n, and V = sum of e^2 / N^2 is too small, because the share
  was fitted to the same documents. If e varies in proportion to n, it is too small by the factor 1 + H2 - 2 H3 / H2,
  with Hj = sum of n^j / N^j: by (m - 1) / m for m documents of equal length. V is divided by it, as CR2 does (Bell and
  McCaffrey 2002, "Bias reduction in standard errors for linear regression with multi-stage samples").
- Degrees of freedom: H2^2 / H4 - 1 for the same reason, m - 1 for equal lengths. A label with a single document has
  none, and its p is 1.
- Skewness. A share's variance depends on the share, so a share that is too low by chance comes with a standard error
  that is too small, and one tail of t is too heavy (Hall 1992, "On the removal of skewness by transformation"). If the
  shares of documents follow a Dirichlet distribution, V changes with the share a like (a (1 - a))^s, where s is 1 to 2
  times g = N * sum of n^3 / (sum of n^2)^2, which is 1 for equal lengths. W is the variance at the share p that is
  expected of the documents: with f = p (1 - p) / (a (1 - a)),

      W = V (1 + 2 g (f - 1))  if a is more extreme than p (f > 1),    W = V f  otherwise,

  and p (1 - p) / N where no token chooses the expert, or all do. Both err towards a larger W.

Shapes: L labels, K recorded labels (sets of several included), E experts, D documents, N of one label.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from collector.query.inference.resampling import memberships, strata_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from collector.query.document_counts import DocumentCounts

_NONE = 1e-9
"""Degrees of freedom, or a share's distance from 0 or 1, that are rounding error."""
_ROUNDING = 1e-12
"""Rounding error of a sum of squares, if all documents agree."""


def t_tails(
    counts: DocumentCounts, expected_DE: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the probabilities of a t at most as large, and at least as large, of shape [L, E].

    Args:
        counts: of the router, a row per document.
        expected_DE: picks that are expected of each document if labels say nothing.

    Returns:
        Both for the labels that have documents, sorted; 1 where the label or all others have a single document.
    """
    strata = strata_of(counts)
    sums_KC = np.array([_sums(counts, expected_DE, documents) for documents in strata.values()])
    _, has_label_KL = memberships(strata)
    own, others = (_Share.of(has_KL.T @ sums_KC) for has_KL in (has_label_KL, 1 - has_label_KL))
    error_LE = np.sqrt(own.variance_LE + others.variance_LE)
    difference_LE = own.excess_LE - others.excess_LE
    t_LE = np.divide(difference_LE, error_LE, out=np.zeros_like(error_LE), where=error_LE > 0)
    known_L1 = (own.freedom_L1 > _NONE) & (others.freedom_L1 > _NONE)
    with np.errstate(divide="ignore", invalid="ignore"):
        parts_LE = own.variance_LE**2 / own.freedom_L1 + others.variance_LE**2 / others.freedom_L1
        freedom_LE = error_LE**4 / parts_LE
    freedom_LE = np.where(known_L1 & (parts_LE > 0), freedom_LE, 1)
    below_LE, above_LE = stats.t.cdf(t_LE, freedom_LE), stats.t.sf(t_LE, freedom_LE)
    return np.where(known_L1, below_LE, 1), np.where(known_L1, above_LE, 1)


def _sums(counts: DocumentCounts, expected_DE: NDArray[np.float64], documents: NDArray[np.intp]) -> NDArray[np.float64]:
    """Sums tokens n, n^2, n^3, n^4, and by expert picks, expected picks, r^2 and r n of their difference r."""
    n_N1 = counts.tokens_D[documents, None].astype(np.float64)
    picks_NE, expected_NE = counts.picks_DE[documents].astype(np.float64), expected_DE[documents]
    r_NE = picks_NE - expected_NE
    powers = [n_N1**power for power in range(1, 5)]
    return np.concatenate([each.sum(axis=0) for each in (*powers, picks_NE, expected_NE, r_NE**2, r_NE * n_N1)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Share:
    """Share of tokens that choose each expert, of the documents of each label or of those without it."""

    excess_LE: NDArray[np.float64]
    """Beyond the share that is expected."""
    variance_LE: NDArray[np.float64]
    """W of the module's description."""
    freedom_L1: NDArray[np.float64]
    """Degrees of freedom."""

    @classmethod
    def of(cls, sums_LC: NDArray[np.float64]) -> _Share:
        """Computes them from `_sums`; 0 for no documents."""
        n_L1, n2_L1, n3_L1, n4_L1 = np.split(sums_LC[:, :4], 4, axis=1)
        picks_LE, expected_LE, rr_LE, rn_LE = np.split(sums_LC[:, 4:], 4, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            share_LE, expected_share_LE = picks_LE / n_L1, expected_LE / n_L1
            excess_LE = share_LE - expected_share_LE
            squares_LE = np.maximum(rr_LE - 2 * excess_LE * rn_LE + excess_LE**2 * n2_L1, _ROUNDING * rr_LE)
            too_small_L1 = 1 + n2_L1 / n_L1**2 - 2 * n3_L1 / (n_L1 * n2_L1)
            variance_LE = squares_LE / n_L1**2 / too_small_L1
            binomial_LE, expected_binomial_LE = (each * (1 - each) for each in (share_LE, expected_share_LE))
            f_LE = expected_binomial_LE / binomial_LE
            slope_L1 = 2 * n_L1 * n3_L1 / n2_L1**2
            variance_LE *= np.where(f_LE > 1, 1 + slope_L1 * (f_LE - 1), f_LE)
            variance_LE = np.where(binomial_LE > _NONE, variance_LE, expected_binomial_LE / n_L1)
            freedom_L1 = n2_L1**2 / n4_L1 - 1
        return cls(
            excess_LE=np.nan_to_num(excess_LE), variance_LE=np.nan_to_num(np.maximum(variance_LE, 0), posinf=0),
            freedom_L1=np.nan_to_num(freedom_L1),
        )  # fmt: skip
