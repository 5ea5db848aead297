"""How the routing of prompts and answers goes together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.spatial.distance import jensenshannon

from tests.helpers.reference.base import Decision, by_router, grouped
from tests.helpers.synthetic import Shard


def phase_divergence(found: Sequence[Decision], shards: Sequence[Shard], others: int, *, pooled: bool) -> dict:
    rows = {}
    for one, decided in by_router(found).items():
        for label, own in grouped(decided, lambda d: None if pooled else d.label).items():
            texts = grouped(own, lambda d: (d.shard, d.doc))
            halves = {
                place: [shares(one.n_experts, [d for d in text if written(d, shards) == phase]) for phase in (0, 1)]
                for place, text in texts.items()
                if {written(d, shards) for d in text} == {False, True}
            }
            if halves:
                order = sorted(halves, key=lambda at: ((at[0] * 1000003 + at[1]) * 2654435761 % 2**32, at))
                rows |= measured((one.stack, one.layer, label), [halves[place] for place in order], others)
    return rows


def measured(where: tuple, halves: Sequence, others: int) -> dict:
    n = len(halves)
    jsd = np.array([[round(jensenshannon(prompt, answer, 2) ** 2, 9) for _, answer in halves] for prompt, _ in halves])
    compared = [[(place + step) % n for step in range(1, min(others + 1, n))] for place in range(n)]
    own = np.diag(jsd)
    if n == 1:
        return {("answer_divergence", *where): (own[0], None, None, 1)}
    other = np.array([jsd[place, at].mean() for place, at in enumerate(compared)])
    nearer = np.array([(np.sign(jsd[place, at] - own[place]) / 2 + 0.5).mean() for place, at in enumerate(compared)])
    errors = [np.std(values, ddof=1) / np.sqrt(n) for values in (own - other, nearer)]
    return {
        ("answer_divergence", *where): (own.mean(), other.mean(), errors[0], n),
        ("own_answer_nearer", *where): (nearer.mean(), 0.5, errors[1], n),
    }


def written(decision: Decision, shards: Sequence[Shard]) -> bool:
    return decision.position >= shards[decision.shard].prompts[decision.doc]


def shares(n_experts: int, decided: Sequence[Decision]) -> np.ndarray:
    picks = np.bincount([expert for d in decided for expert in d.experts], minlength=n_experts)
    return picks / picks.sum()
