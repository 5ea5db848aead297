"""How evenly experts are loaded."""

from __future__ import annotations

import itertools
import math
from collections import Counter
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


def plan_transfer(found: Sequence[Decision], halves: dict, *, gpus: int, replicas: int | None, by_layer: bool) -> dict:
    """`halves` says of each (shard, doc) whether it is in the first half of its label's documents."""
    rows: dict[tuple, list[tuple[float, ...]]] = {}
    for one, decided in by_router(found).items():
        slots = replicas or math.ceil(one.n_experts / gpus) * gpus
        loads: dict[bool, dict[str, list[int]]] = {True: {}, False: {}}
        for (first, label), own in grouped(decided, lambda d: (halves[d.shard, d.doc], d.label)).items():
            picked = [expert for d in own for expert in d.experts]
            loads[first][label] = [picked.count(expert) for expert in range(one.n_experts)]
        plans = {label: eplb(load, gpus, slots) for label, load in loads[True].items()}
        size = slots // gpus
        in_order = [[(gpu * size + i) % one.n_experts for i in range(size)] for gpu in range(gpus)]
        for label, load in loads[False].items():
            for planned_for, plan in plans.items():
                value, own, baseline = (_balancedness(load, each) for each in (plan, plans[label], in_order))
                key = ("balancedness", one.stack, one.layer if by_layer else None, label, planned_for)
                rows.setdefault(key, []).append((value, baseline, sum(load) / one.top_k, own, own - value))
    mean = {key: [sum(column) / len(column) for column in zip(*values, strict=True)] for key, values in rows.items()}
    return {key: tuple(values) for key, values in mean.items()}


def eplb(load: Sequence[float], gpus: int, slots: int) -> list[list[int]]:
    """The experts of each GPU, one decision at a time: EPLB without groups."""
    replicas = [1] * len(load)
    held = list(range(len(load)))
    while len(held) < slots:
        heaviest = max(range(len(load)), key=lambda e: load[e] / replicas[e])
        held.append(heaviest)
        replicas[heaviest] += 1
    if slots == gpus:
        return [[expert] for expert in held]
    experts, sums = [[] for _ in range(gpus)], [0.0] * gpus
    for expert in sorted(held, key=lambda e: -load[e] / replicas[e]):
        lightest = min((gpu for gpu in range(gpus) if len(experts[gpu]) < slots // gpus), key=sums.__getitem__)
        experts[lightest].append(expert)
        sums[lightest] += load[expert] / replicas[expert]
    return experts


def _balancedness(load: Sequence[float], experts: Sequence[Sequence[int]]) -> float:
    replicas = Counter(itertools.chain(*experts))
    sums = [sum(load[expert] / replicas[expert] for expert in own) for own in experts]
    return sum(sums) / len(sums) / max(sums)
