"""Two runs of the same tokens, document by document."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from collector.store.tables import Layer
from tests.helpers.reference.base import Decision, decisions, grouped
from tests.helpers.reference.frequency import expected_jaccard
from tests.helpers.synthetic import Shard

Pair = tuple[Decision, Decision]


def pairs(
    layers: Sequence[Layer], ours: Sequence[Shard], theirs: Sequence[Shard], *, include_special: bool
) -> list[Pair]:
    """What both runs decided about each token; documents have ids."""
    runs = []
    for shards in (ours, theirs):
        found = decisions(layers, shards, include_special=include_special)
        runs.append({(d.router, shards[d.shard].document_ids[d.doc], d.position): d for d in found})
    assert runs[0].keys() == runs[1].keys()
    return [(one, runs[1][where]) for where, one in runs[0].items()]


def router_saturation(found: Sequence[Pair], *, pooled: bool) -> dict:
    rows = {}
    for (router, label), same in _groups(found, pooled=pooled).items():
        one = same[0][0].geometry
        value = np.mean([len(set(a.experts) & set(b.experts)) / one.top_k for a, b in same])
        rows["router_saturation", *router, label] = (value, one.top_k / one.n_experts, len(same))
    return rows


def quantization_fidelity(found: Sequence[Pair], *, pooled: bool, by: str) -> dict:
    rows = {}
    decile = _deciles(found, by)
    for (router, label), same in _groups(found, pooled=pooled).items():
        one = same[0][0].geometry
        for place in {0, *(decile[id(a)] for a, _ in same)}:
            cell = [(a, b) for a, b in same if place in (0, decile[id(a)])]
            jaccard = np.mean([len({*a.experts} & {*b.experts}) / len({*a.experts} | {*b.experts}) for a, b in cell])
            flips = np.mean([a.top1 != b.top1 for a, b in cell])
            chance = expected_jaccard(one.n_experts, one.top_k, one.top_k)
            rows["topk_jaccard", *router, label, place] = (jaccard, chance, len(cell))
            rows["top1_flips", *router, label, place] = (flips, 1 - 1 / one.n_experts, len(cell))
        changes = [_specialization_change(labelled) for labelled in grouped(same, lambda pair: pair[0].label).values()]
        mean, largest, is_same = np.array(changes).T
        rows["specialization_change", *router, label, 0] = (mean.mean(), 0, len(same))
        rows["largest_specialization_change", *router, label, 0] = (largest.max(), 0, len(same))
        rows["same_top_expert", *router, label, 0] = (is_same.mean(), 1 / one.n_experts, len(same))
    return rows


def _groups(found: Sequence[Pair], *, pooled: bool) -> dict:
    return grouped(found, lambda pair: (pair[0].router, None if pooled else pair[0].label))


def _deciles(found: Sequence[Pair], by: str) -> dict[int, int]:
    deciles = {}
    for same in grouped(found, lambda pair: pair[0].router).values():
        gaps = np.array([_gap(a, by) for a, _ in same])
        for (a, _), gap in zip(same, gaps, strict=True):
            deciles[id(a)] = 1 + 10 * int((gaps < gap).sum()) // len(gaps)
    return deciles


def _gap(decision: Decision, by: str) -> float:
    if by == "margin" or len(decision.weights) < 2:
        return decision.statistics["margin"]
    second, first = np.sort(np.array(decision.weights, np.float32))[-2:]
    return first - second


def _specialization_change(same: Sequence[Pair]) -> tuple[float, float, bool]:
    frequencies = [
        np.bincount(np.concatenate([d.experts for d in run]), minlength=run[0].geometry.n_experts) / len(run)
        for run in zip(*same, strict=True)
    ]
    change = np.abs(frequencies[1] - frequencies[0])
    return change.mean(), change.max(), frequencies[0].argmax() == frequencies[1].argmax()
