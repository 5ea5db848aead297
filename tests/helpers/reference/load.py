"""How evenly experts are loaded."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from tests.helpers.reference.base import Decision, by_router, grouped


def load_balance(
    found: Sequence[Decision], *, pooled: bool, threshold: float, m: int | None, probabilities: bool
) -> dict:
    rows = {}
    for one, decided in by_router(found).items():
        e, k = one.n_experts, one.top_k
        top = min(m or k, e)
        for label, own in grouped(decided, lambda d: None if pooled else d.label).items():
            picks = np.bincount([expert for d in own for expert in d.experts], minlength=e)
            shares = picks / picks.sum()
            differences = sum(abs(a - b) for a, b in itertools.product(shares, repeat=2))
            texts = list(grouped(own, lambda d: (d.shard, d.doc)).values())
            unions = [len({expert for d in text for expert in d.experts}) / e for text in texts]
            metrics = {
                "gini": (differences / (2 * e), 0, len(own)),
                "coefficient_of_variation": (picks.std() / picks.mean(), 0, len(own)),
                "max_over_mean": (picks.max() / picks.mean(), 1, len(own)),
                "mean_over_max": (picks.mean() / picks.max(), 1, len(own)),
                "dead_share": (np.mean(picks / len(own) < threshold), 0, len(own)),
                "coverage": (np.sort(shares)[-top:].sum(), top / e, len(own)),
                "document_union": (np.mean(unions), np.mean([_random_union(one, len(t)) for t in texts]), len(texts)),
            }
            if probabilities:
                mean_p = np.mean([d.probabilities for d in own], axis=0)
                metrics["load_balance_loss"] = (e * shares @ mean_p, 1, len(own))
            rows |= {(metric, one.stack, one.layer, label): values for metric, values in metrics.items()}
    return rows


def expert_load(found: Sequence[Decision], *, threshold: float) -> dict:
    rows = {}
    for one, decided in by_router(found).items():
        for expert in range(one.n_experts):
            picks = sum(expert in d.experts for d in decided)
            value = picks / len(decided)
            key = ("expert_load", one.stack, one.layer, expert)
            rows[key] = (value, one.top_k / one.n_experts, len(decided), picks, value < threshold)
    return rows


def _random_union(one, tokens: int) -> float:
    return 1 - (1 - one.top_k / one.n_experts) ** tokens
