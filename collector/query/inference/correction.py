"""Corrects the bias of divergences, similarities and effective numbers, which depend on the number of documents.

Two labels that choose alike have different shares in any finite sample, so their divergence is above 0, their
similarity below 1, and the more so the fewer documents there are; a label with few documents seems to use fewer
experts. Samples of documents have that bias a second time: the mean of their values minus the value estimates it
(Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 10.2), and the corrected value is the value
minus that difference. Of N documents N - 1 are drawn with replacement, since draws of N vary too little by the factor
(N - 1) / N (McCarthy and Snowden 1985, "The bootstrap and finite population sampling").

The correction removes what is proportional to 1 / N, and adds chance: a corrected divergence may be below 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from collector.query.catalog import find_query
from collector.query.inference.answers import ask
from collector.query.inference.bootstrap import fewest_documents, routers, sampled_values
from collector.store import tables

if TYPE_CHECKING:
    from collector.query.warehouse import Run

RESAMPLES = 200
"""Samples that make the mean exact to 7 % of the standard error."""
_FEW_PICKS = 50_000_000
"""Picks of a run without a rollup that are counted by document in a few seconds."""


def is_quick(run: Run, name: str, **params: object) -> bool:
    """Whether the documents that a query asks about are counted already, or in a few seconds.

    Args:
        run: an opened run.
        name: of the query.
        **params: of the query, as for `Run.query`.
    """
    values = run.bind(find_query(name), params)
    (tokens,) = run.cursor().sql("select coalesce(sum(tokens), 0) from documents").fetchall()[0]
    picks = sum(tokens * router.top_k for router in tables.asked_layers(tables.recorded_layers(run.info), values))
    return run.has_rollup or picks <= _FEW_PICKS


def corrected(run: Run, name: str, *, resamples: int = RESAMPLES, seed: int = 0, **params: object) -> pa.Table:
    """Runs a label-level query, and adds the corrected value of each row whose metric is biased.

    Args:
        run: an opened run.
        name: of a query with a header `Biased:`.
        resamples: bootstrap samples.
        seed: of the draws.
        **params: of the query, as for `Run.query`.

    Returns:
        The query's rows with further columns: `corrected`, null where the metric has no such bias, or a label has a
        single document; and `documents` (of the row's label that has the fewest).

    Raises:
        ValueError: the query does not follow from sums over documents, resamples are fewer than 2; and for the same
            reasons as `Run.query`.
    """
    if resamples < 2:
        raise ValueError(f"resamples must be at least 2, got {resamples}")
    answer, asked = ask(run, name, params)
    biased = np.isin(answer["metric"].to_pylist(), asked.query.biased)
    value_R, documents_R = np.full(answer.num_rows, np.nan), np.zeros(answer.num_rows, np.int64)
    for here, rows, counts in routers(run, asked, answer, params):
        documents_R[here] = fewest_documents(rows, counts)
        wanted = np.flatnonzero(biased[here] & (documents_R[here] > 1))
        some = rows.take(wanted)
        drawn_RS = sampled_values(asked, some, counts, resamples=resamples, seed=seed, left_out=1)
        plain_R = some["value"].cast(pa.float64()).to_numpy()
        value_R[here[wanted]] = 2 * plain_R - drawn_RS.mean(axis=1)
    place = answer.column_names.index("value") + 1
    answer = answer.add_column(place, "corrected", pa.array(value_R, from_pandas=True))
    return answer.append_column("documents", pa.array(documents_R))
