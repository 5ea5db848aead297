"""Which experts are special for a label or a token, and how much a label says about experts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from tests.helpers.reference.base import Decision, Group, by_router, entropy, grouped


def log_odds(found: Sequence[Group], strength: float) -> dict:
    rows = {}
    for g in found:
        rest = sum(
            (other.picks for other in found if other.geometry == g.geometry and other.label != g.label), 0 * g.picks
        )
        pooled = g.picks + rest
        alpha = strength * g.geometry.n_experts * pooled / pooled.sum()
        for expert, (own, other) in enumerate(zip(g.picks + alpha, rest + alpha, strict=True)):
            totals = g.picks.sum() + alpha.sum(), rest.sum() + alpha.sum()
            value = difference = None
            if 0 < pooled[expert] < pooled.sum():
                difference = math.log(own / (totals[0] - own)) - math.log(other / (totals[1] - other))
                value = difference / math.sqrt(1 / own + 1 / other)
            key = ("log_odds_z", *g.router, g.label, expert)
            rows[key] = (value, 0, g.tokens, g.picks[expert], difference)
    return rows


def reference_difference(found: Sequence[Group], reference: str) -> dict:
    rows = {}
    bases = {g.geometry: g for g in found if g.label == reference}
    for g in (g for g in found if g.geometry in bases and g.label != reference):
        base = bases[g.geometry]
        for expert in range(g.geometry.n_experts):
            own, other = g.picks[expert] / g.tokens, base.picks[expert] / base.tokens
            key = ("reference_difference", *g.router, g.label, expert)
            rows[key] = (own - other, 0, min(g.tokens, base.tokens), own, reference, other, base.tokens)
    return rows


def mutual_information(found: Sequence[Group]) -> dict:
    """Over the full joint distribution, as a divergence of it from the product of its marginals."""
    rows = {}
    for geometry, together in grouped(found, lambda g: g.geometry).items():
        joint = np.array([g.picks / g.picks.sum() for g in together]) / len(together)
        bits = entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint.ravel())
        bits /= math.log(2)
        used = np.count_nonzero(joint.sum(0))
        noise = sum(1 / g.picks.sum() for g in together)
        bias = (used - geometry.top_k) * (len(together) - 1) / (2 * len(together) ** 2 * math.log(2)) * noise
        n, unit = sum(g.tokens for g in together), math.log2(len(together))
        router = geometry.stack, geometry.layer
        rows["mutual_information", *router] = (bits, 0, n, len(together), bias)
        normalized = (bits / unit, 0, n, len(together), bias / unit) if unit else (None, 0, n, 1, None)
        rows["normalized_mutual_information", *router] = normalized
    return rows


def vocabulary_specialization(found: Sequence[Decision], min_count: int) -> dict:
    rows = {}
    for one, decided in by_router(found).items():
        for name, k, experts_of in (("topk", one.top_k, _topk), ("top1", 1, _top1)):
            favourites = list(_favourites(decided, min_count, experts_of))
            if not favourites:
                continue
            for key, chosen in [((f"layer_{name}", one.stack, one.layer, None), favourites)] + [
                ((f"expert_{name}", one.stack, one.layer, expert), [each for each in favourites if each[0] == expert])
                for expert in range(one.n_experts)
            ]:
                value = np.mean([share for _, share, _ in chosen]) if chosen else None
                rows[key] = (value, k / one.n_experts, len(chosen), sum(count for *_, count in chosen))
    return rows


def expert_tokens(found: Sequence[Decision], min_count: int, n: int) -> dict:
    rows = {}
    for one, decided in by_router(found).items():
        own: dict[int, list[tuple]] = {}
        for token_id, same_id in grouped(decided, lambda d: d.token_id).items():
            for expert, share, count in _favourites(same_id, min_count, _topk):
                own.setdefault(expert, []).append((-share, -round(share * count), token_id, count))
        for expert, tokens in own.items():
            for rank, (value, picks, token_id, count) in enumerate(sorted(tokens)[:n], start=1):
                cells = (token_id, f"token {token_id}", -value, one.top_k / one.n_experts, count, -picks)
                rows["expert_tokens", one.stack, one.layer, expert, rank] = cells
    return rows


def label_npmi(found: Sequence[Group]) -> dict:
    rows = {}
    for one, together in grouped(found, lambda g: g.geometry).items():
        joint_de = np.array([g.picks / g.tokens for g in together]) / len(together)
        for g, joint_e in zip(together, joint_de, strict=True):
            for expert, p in enumerate(joint_e):
                value = _npmi(p, joint_de[:, expert].sum(), 1 / len(together))
                rows["label_npmi", one.stack, one.layer, g.label, expert] = (value, 0, g.tokens, g.picks[expert])
    return rows


def token_npmi(found: Sequence[Decision], min_count: int, n: int, token_id: int | None) -> dict:
    rows = {}
    for one, decided in by_router(found).items():
        total, tokens_of = len(decided), Counter(d.token_id for d in decided)
        for expert in range(one.n_experts):
            own = Counter(d.token_id for d in decided if expert in d.experts)
            ranked = sorted(
                (-_npmi(count / total, own.total() / total, tokens_of[x] / total), -count, x)
                for x, count in own.items()
                if tokens_of[x] >= min_count and token_id in (None, x)
            )
            for rank, (value, count, x) in enumerate(ranked[:n], start=1):
                rows["token_npmi", one.stack, one.layer, expert, rank] = (
                    x, f"token {x}", -value, 0, tokens_of[x], -count,
                )  # fmt: skip
    return rows


def _npmi(joint: float, p: float, q: float) -> float | None:
    """Of two events with probabilities p and q > 0; None if the first never happens."""
    if joint == 0:
        return -1 if p else None
    if math.isclose(joint, p * q, rel_tol=1e-12):
        return 0
    return math.log(joint / (p * q)) / -math.log(joint)


def _topk(decision: Decision) -> list[int]:
    return decision.experts


def _top1(decision: Decision) -> list[int]:
    return [decision.top1]


def _favourites(decided: Sequence[Decision], min_count: int, experts_of: Callable[[Decision], list[int]]):
    """(expert, its share, occurrences) of each token id."""
    for same_id in grouped(decided, lambda d: d.token_id).values():
        if len(same_id) >= min_count:
            picks = Counter(expert for decision in same_id for expert in experts_of(decision))
            expert = min(picks, key=lambda e: (-picks[e], e))
            yield expert, picks[expert] / len(same_id), len(same_id)


def conditional_mutual_information(found: Sequence[Decision], lots: dict[tuple[int, int], int]) -> dict:
    """`lots`: (shard, tok) -> what the shuffle orders the tokens of an id by."""
    rows = {}
    for one, decided in by_router(found).items():
        tokens_of = Counter(d.label for d in decided)
        ids = list(grouped(decided, lambda d: d.token_id).values())
        shuffled = [_shuffled_labels(same_id, lots) for same_id in ids]
        information = [
            _information(one.n_experts, ids, labels, tokens_of)
            for labels in ([[d.label for d in same_id] for same_id in ids], shuffled)
        ]
        (bits, label_bits), (baseline, _) = information
        shared = sum(
            1 / tokens_of[d.label] / len(tokens_of) for same_id in ids for d in same_id
            if len({d.label for d in same_id}) > 1
        )  # fmt: skip
        fixed = (len(decided), len(tokens_of), shared)
        rows["conditional_mutual_information", one.stack, one.layer] = (bits, baseline, *fixed)
        normalized = (bits / label_bits, baseline / label_bits) if shared else (None, None)
        rows["normalized_conditional_mutual_information", one.stack, one.layer] = (*normalized, *fixed)
    return rows


def _shuffled_labels(same_id: Sequence[Decision], lots: dict[tuple[int, int], int]) -> list[str]:
    """The i-th occurrence gets the label of the one with the i-th lowest lot."""
    drawn = sorted(same_id, key=lambda d: (lots[d.shard, d.tok], d.shard, d.tok))
    return [d.label for d in drawn]


def _information(n_experts: int, ids, labels_of_ids, tokens_of: Counter) -> tuple[float, float]:
    """I(e;D|x) and H(D|x) in bits, as means over the ids of what each has."""
    information = label_entropy = 0.0
    for same_id, labels in zip(ids, labels_of_ids, strict=True):
        names = sorted(set(labels))
        p_de = np.zeros((len(names), n_experts))
        for decision, label in zip(same_id, labels, strict=True):
            weight = 1 / tokens_of[label] / len(tokens_of) / len(decision.experts)
            p_de[names.index(label), decision.experts] += weight
        p_x = p_de.sum()
        p_de = p_de / p_x
        label_entropy += p_x * entropy(p_de.sum(1))
        information += p_x * (entropy(p_de.sum(1)) + entropy(p_de.sum(0)) - entropy(p_de.ravel()))
    return information / math.log(2), label_entropy / math.log(2)
