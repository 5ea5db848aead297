"""Computes confidence intervals for label-level queries, by a bootstrap over documents.

Documents are drawn with replacement within each label, and the query's own statement runs over each sample (`answers`).
The interval of a row lies between two quantiles of its values in the samples, with two corrections:

- Few documents: the plain bootstrap underestimates the spread by sqrt((N - 1) / N) and uses a normal tail instead of
  a t tail with N - 1 degrees of freedom. The quantiles are moved outwards accordingly (Hesterberg 2015, "What Teachers
  Should Know About the Bootstrap", arXiv 1411.5279: expanded percentile). If documents differ in length, the long ones
  dominate: N is then (sum of n)^2 / (sum of n^2) over their tokens n (Kish 1965, Survey Sampling: effective sample
  size).
- Bias: divergences, similarities and numbers of experts depend on the sample size, so each sample adds the bias of the
  answer a second time. If the bias (mean of the samples - value) exceeds what chance explains, the interval is shifted
  back by twice the bias. Sets change in jumps, so what follows from a single one and whole numbers are not shifted.
  `weighted_jaccard` has a kink, where the samples do not show the bias: see the module `weighted_jaccard`.

Guarantees: the result has the query's rows, in its order and with all its columns; the same seed gives the same
interval, whatever other labels or layers are requested. Memory: 8 bytes x rows of a router's answer x resamples, and
for `weighted_jaccard` 8 bytes x labels x experts x resamples.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy import stats

from collector.query.document_counts import document_counts, document_losses
from collector.query.inference import weighted_jaccard
from collector.query.inference.answers import SampledQuery, ask
from collector.query.inference.resampling import bootstrap, lengths_of
from collector.query.matching import compared

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from collector.query.document_counts import DocumentCounts
    from collector.query.inference.resampling import Sums
    from collector.query.warehouse import Run

_CHANCE = 3.0
"""A bias is corrected if it exceeds so many standard errors of the mean of the samples."""
_SETS = {"jaccard", "committee_size", "committee_mass"}
"""Metrics of sets, which change in jumps."""
_LABELS = ("label", "label_a", "label_b", "reference")
"""Columns that name a label of the row."""


def intervals(
    run: Run,
    name: str,
    *,
    level: float = 95.0,
    resamples: int = 1000,
    seed: int = 0,
    column: str = "value",
    **params: object,
) -> pa.Table:
    """Runs a label-level query and adds an interval to each row.

    Args:
        run: an opened run.
        name: of the query.
        level: nominal coverage in percent.
        resamples: bootstrap samples.
        seed: of the draws.
        column: column of the query for which the interval is computed.
        **params: of the query, as for `Run.query`.

    Returns:
        The query's rows with further columns: `documents` (of the row's label that has the fewest), `low`, `high`,
        `standard_error` and `bootstrap_bias` (mean of the samples - value) of the column; null if a label has a single
        document, or a sample has no value. An interval may extend beyond the range of its metric: a divergence whose
        low end is below 0 may be zero.

    Raises:
        ValueError: the query does not follow from sums over documents, has no such column, or level or resamples are
            out of range; and for the same reasons as `Run.query`.
    """
    require_range(level, resamples)
    answer, asked = ask(run, name, params, column)
    added = {
        name: np.full(answer.num_rows, np.nan)
        for name in ("documents", "low", "high", "standard_error", "bootstrap_bias")
    }
    for here, rows, counts in routers(run, asked, answer, params):
        documents_R = fewest_documents(rows, counts)
        found, _ = router_intervals(asked, rows, counts, resamples=resamples, seed=seed, level=level, column=column)
        for values, each in zip(added.values(), (documents_R, *dataclasses.astuple(found)), strict=True):
            values[here] = each
    for name, values in added.items():
        numbers = pa.array(values, from_pandas=True)  # NaN becomes null
        answer = answer.append_column(name, numbers.cast(pa.int64()) if name == "documents" else numbers)
    return answer


def router_intervals(
    asked: SampledQuery,
    rows: pa.Table,
    counts: DocumentCounts,
    *,
    resamples: int,
    seed: int,
    level: float = 95.0,
    column: str = "value",
) -> tuple[Interval, NDArray[np.float64]]:
    """Returns the intervals of a router's R rows, and their values in S samples, [R, S], sorted."""
    has_kink = column == "value" and weighted_jaccard.METRIC in rows["metric"].to_pylist()
    overlaps = weighted_jaccard.Overlaps(asked.query.name, counts) if has_kink else None
    note = overlaps.note if overlaps else None
    values_RS = sampled_values(asked, rows, counts, resamples=resamples, seed=seed, note=note)
    documents_R = effective_documents(rows, counts)
    found = interval(values_RS, documents_R, level, estimates(rows, column))
    if overlaps is None:
        return found, values_RS
    low_R, high_R, has_R = overlaps.ends(rows, _tail(np.maximum(documents_R, 2), level))
    here_R = has_R & ~np.isnan(found.low_R)
    ends = {"low_R": np.where(here_R, low_R, found.low_R), "high_R": np.where(here_R, high_R, found.high_R)}
    return dataclasses.replace(found, **ends), values_RS


def sampled_values(
    asked: SampledQuery, rows: pa.Table, counts: DocumentCounts, *, resamples: int, seed: int, size: int | None = None,
    left_out: int = 0, note: Callable[[Sums], None] | None = None,
) -> NDArray[np.float64]:  # fmt: skip
    """Returns a router's R rows in S bootstrap samples, [R, S]; for `size` and `left_out` see `bootstrap`.

    `note` is called with each portion of the samples.
    """
    values = []
    for sums in bootstrap(counts, resamples=resamples, seed=seed, size=size, left_out=left_out):
        values.append(asked.values(rows, counts, sums))
        if note is not None:
            note(sums)
    return np.concatenate(values, axis=1)


def require_range(level: float, resamples: int) -> None:
    """Rejects a level that is not a percentage, and too few resamples to measure a spread."""
    if not 0 < level < 100:
        raise ValueError(f"the level of an interval is a percentage between 0 and 100, as 95, got {level:g}")
    if resamples < 2:
        raise ValueError(f"resamples must be at least 2, got {resamples}")


def routers(
    run: Run, asked: SampledQuery, answer: pa.Table, params: Mapping[str, object]
) -> Iterator[tuple[NDArray[np.intp], pa.Table, DocumentCounts]]:
    """Splits the answer by router: yields the indices of the router's rows, the rows, and its document counts."""
    values: dict[str, Any] = asked.query.bind(params)
    labels = compared(run, values)
    special = values["include_special"]
    if "label_losses" in asked.query.reads:  # of the whole model
        for counts in document_losses(run, labels=labels, include_special=special):
            yield np.arange(answer.num_rows), answer, counts
        return
    outputs = "label_outputs" in asked.query.reads
    where = {"stack": values["stack"], "layer": values["layer"], "include_special": special, "outputs": outputs}
    for counts in document_counts(run, labels=labels, **where):
        here = pc.and_(pc.equal(answer["stack"], counts.stack), pc.equal(answer["layer"], counts.layer))
        place = np.flatnonzero(here.to_numpy())
        yield place, answer.take(place), counts


def fewest_documents(rows: pa.Table, counts: DocumentCounts) -> NDArray[np.int64]:
    """Returns the documents of each row's label with the fewest, of shape [R]; of all labels if rows name none."""
    return _least(rows, {label: len(tokens_N) for label, tokens_N in lengths_of(counts).items()})


def effective_documents(rows: pa.Table, counts: DocumentCounts) -> NDArray[np.float64]:
    """Returns the effective number of documents, of shape [R]; equal to `fewest_documents` if lengths are equal."""
    return _least(rows, {label: n.sum() ** 2 / (n**2).sum() for label, n in lengths_of(counts).items()})


def _least(rows: pa.Table, of_label: Mapping[str | None, float]) -> NDArray:
    """Returns the minimum over the labels that each row names, of shape [R]; over all labels where it names none."""
    named = [rows[column].to_pylist() for column in _LABELS if column in rows.column_names]
    if not named:
        return np.full(rows.num_rows, min(of_label.values()))
    of_label = {**of_label, None: min(of_label.values())}
    return np.array([min(of_label[label] for label in labels) for labels in zip(*named, strict=True)])


def estimates(rows: pa.Table, column: str) -> NDArray[np.float64]:
    """Returns the values whose samples may be biased, of shape [R]; NaN for sets and whole numbers."""
    if pa.types.is_integer(rows.schema.field(column).type):
        return np.full(rows.num_rows, np.nan)
    jumps_R = np.array([metric in _SETS for metric in rows["metric"].to_pylist()])
    return np.where(jumps_R, np.nan, rows[column].cast(pa.float64()).to_numpy())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """Interval, standard error and bias of each of R rows; NaN where they cannot be computed."""

    low_R: NDArray[np.float64]
    high_R: NDArray[np.float64]
    standard_error_R: NDArray[np.float64]
    bias_R: NDArray[np.float64]


def interval(
    values_RS: NDArray[np.float64],
    documents_R: NDArray[np.float64],
    level: float,
    estimate_R: NDArray[np.float64] | None = None,
) -> Interval:
    """Computes the interval of each row.

    Args:
        values_RS: [R, S] the values of R rows in S samples; sorted in place.
        documents_R: [R] the number of documents drawn from, see `effective_documents`.
        level: nominal coverage in percent.
        estimate_R: [R] the values in the run, to correct the bias of the samples; NaN or None for no correction.
    """
    values_RS.sort(axis=1)  # NaN goes last
    known_R = (documents_R > 1) & ~np.isnan(values_RS[:, -1])
    tail_R = _tail(np.maximum(documents_R, 2), level)
    error_R = values_RS.std(axis=1, ddof=1)
    bias_R = values_RS.mean(axis=1) - (np.nan if estimate_R is None else estimate_R)
    chance_R = _CHANCE * error_R / np.sqrt(values_RS.shape[1])
    shift_R = np.where(np.abs(bias_R) > chance_R, 2 * bias_R, 0)
    low_R, high_R = (_quantile(values_RS, share_R) - shift_R for share_R in (tail_R, 1 - tail_R))
    found = {"low_R": low_R, "high_R": high_R, "standard_error_R": error_R, "bias_R": bias_R}
    return Interval(**{name: np.where(known_R, each, np.nan) for name, each in found.items()})


def _tail(documents_R: NDArray[np.float64], level: float) -> NDArray[np.float64]:
    """Returns the share of samples beyond each end."""
    quantile = stats.t.ppf(0.5 + level / 200, documents_R - 1)
    return stats.norm.cdf(-np.sqrt(documents_R / (documents_R - 1)) * quantile)


def _quantile(sorted_RS: NDArray[np.float64], share_R: NDArray[np.float64]) -> NDArray[np.float64]:
    """Computes numpy's linear quantile with a separate share for each row."""
    place_R = share_R * (sorted_RS.shape[1] - 1)
    below_R = np.floor(place_R).astype(np.int64)
    above_R = np.minimum(below_R + 1, sorted_RS.shape[1] - 1)
    rows = np.arange(len(sorted_RS))
    low_R, high_R = sorted_RS[rows, below_R], sorted_RS[rows, above_R]
    return low_R + (place_R - below_R) * (high_R - low_R)
