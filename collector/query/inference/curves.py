"""Computes a query's values and intervals at growing numbers of documents, to show if more would change the answer.

For every size, samples of that many documents are drawn with replacement from each label, and the query runs over them.
If the interval is still wide at the available number of documents, the curve beyond that number shows how many more of
the same kind are needed. If the value itself changes with the size (a divergence, a count of experts), it is biased by
the sample size, and labels can be compared only at equal sizes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from collector.data.sources import LABEL_SEPARATOR
from collector.query.inference.answers import KEYS, ask
from collector.query.inference.bootstrap import (
    effective_documents,
    fewest_documents,
    interval,
    require_range,
    routers,
    sampled_values,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from collector.query.warehouse import Run

SIZES = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


def sample_size_curve(
    run: Run,
    name: str = "domain_specialization",
    *,
    sizes: Sequence[int] | None = None,
    level: float = 95.0,
    resamples: int = 1000,
    seed: int = 0,
    column: str = "value",
    **params: object,
) -> pa.Table:
    """Computes value and interval of each row of a label-level query, at several numbers of documents per label.

    Args:
        run: an opened run.
        name: of the query.
        sizes: numbers of documents (default: 10, 20, 50, 100 … up to four times those of the smallest label).
        level: nominal coverage in percent.
        resamples: bootstrap samples at each size.
        seed: of the draws.
        column: column of the query for which the curve is computed.
        **params: of the query, as for `Run.query`.

    Returns:
        The query's keys, `documents` drawn, `available` (of the row's label that has the fewest), `value` (the mean
        over the samples), `low` and `high` (the interval at `level`), `width` (high - low) and `standard_error`;
        ordered by key, then documents.

    Raises:
        ValueError: a size is below 2, or documents have several labels; and for the same reasons as `intervals`.
    """
    require_range(level, resamples)
    if sizes is not None and min(sizes, default=0) < 2:
        raise ValueError(f"sizes must be numbers of documents, 2 at least, got {list(sizes)}")
    answer, asked = ask(run, name, params, column)
    keys = answer.select([name for name in answer.column_names if name in ("stack", *KEYS)])
    tables = []
    for place, rows, counts in routers(run, asked, answer, params):
        if any(LABEL_SEPARATOR in name for name in counts.labels):
            raise ValueError("documents have several labels here, so that many of each label cannot be drawn: see the "
                             "intervals of `collector query`")  # fmt: skip
        available_R = fewest_documents(rows, counts)
        worth_R = effective_documents(rows, counts) / available_R
        for size in sizes or _sizes(int(available_R.min())):
            values_RS = sampled_values(asked, rows, counts, resamples=resamples, seed=seed, size=size)
            mean_R, documents_R = values_RS.mean(axis=1), np.full(len(place), size)
            found = interval(values_RS, size * worth_R, level)
            columns = {
                "row": place, "documents": documents_R, "available": available_R, "value": mean_R, "low": found.low_R,
                "high": found.high_R, "width": found.high_R - found.low_R, "standard_error": found.standard_error_R,
            }  # fmt: skip
            tables.append(_append(keys.take(place), columns))
    if not tables:
        raise ValueError("there is no curve to draw: no router has a token to count")
    table = pa.concat_tables(tables)
    return table.sort_by([("row", "ascending"), ("documents", "ascending")]).drop_columns("row")


def _sizes(available: int) -> list[int]:
    return [size for size in SIZES if size <= 4 * available] or [SIZES[0]]


def _append(table: pa.Table, columns: dict[str, NDArray]) -> pa.Table:
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values, from_pandas=True))
    return table
