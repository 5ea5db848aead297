"""How often experts are chosen, how alike labels are in it, and how decided the router is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from tests.helpers.reference.base import Decision, Group, by_router, entropy, grouped


def selection_frequency(found: Sequence[Group]) -> dict:
    rows = {}
    for g in found:
        e, k = g.geometry.n_experts, g.geometry.top_k
        metrics = {
            "selection_share": (g.picks / g.picks.sum(), 1 / e),
            "selection_frequency": (g.picks / g.tokens, k / e),
            "top1_frequency": (g.top1 / g.tokens, 1 / e),
            "weighted_share": (g.weight_sums / g.weight_sums.sum(), 1 / e),
        }
        for metric, (values, baseline) in metrics.items():
            for expert, value in enumerate(values):
                rows[metric, *g.router, g.label, expert] = (value, baseline, g.tokens)
    return rows


def domain_specialization(found: Sequence[Group]) -> dict:
    rows = {}
    for g in found:
        together = [other for other in found if other.geometry == g.geometry]
        shares = np.array([other.picks / other.picks.sum() for other in together])
        ds = np.array([other.picks / other.tokens for other in together])
        for expert in range(g.geometry.n_experts):
            value = g.picks[expert] / g.tokens
            share = g.picks[expert] / g.picks.sum()
            chosen = ds[:, expert].sum() > 0
            exclusivity = value / ds[:, expert].sum() if chosen else None
            lift = share / shares[:, expert].mean() if chosen else None
            baseline = g.geometry.top_k / g.geometry.n_experts
            key = ("domain_specialization", *g.router, g.label, expert)
            rows[key] = (value, baseline, g.tokens, g.picks[expert], exclusivity, 1 / len(together), lift)
    return rows


def language_overlap(found: Sequence[Group], m: int | None) -> dict:
    rows = {}
    for a in found:
        for b in (other for other in found if other.geometry == a.geometry):
            e, size = a.geometry.n_experts, m or a.geometry.top_k
            f_a, f_b = a.picks / a.tokens, b.picks / b.tokens
            set_a, set_b = _most_used(a, size), _most_used(b, size)
            s_a, s_b = f_a / f_a.sum(), f_b / f_b.sum()
            jsd = entropy((s_a + s_b) / 2) - (entropy(s_a) + entropy(s_b)) / 2
            metrics = {
                "jaccard": (len(set_a & set_b) / len(set_a | set_b), expected_jaccard(e, len(set_a), len(set_b))),
                "weighted_jaccard": (np.minimum(f_a, f_b).sum() / np.maximum(f_a, f_b).sum(), None),
                "cosine": (f_a @ f_b / np.linalg.norm(f_a) / np.linalg.norm(f_b), None),
                "jsd": (jsd / math.log(2), 0),
            }
            n = min(a.tokens, b.tokens)
            for metric, (value, baseline) in metrics.items():
                rows[metric, *a.router, a.label, b.label] = (value, baseline, n, a.tokens, b.tokens, size)
    return rows


def expected_jaccard(e: int, a: int, b: int) -> float:
    """Mean Jaccard of two independent uniform subsets of sizes a and b, exactly."""
    total = Fraction(0)
    for shared in range(max(0, a + b - e), min(a, b) + 1):
        ways = math.comb(a, shared) * math.comb(e - a, b - shared)
        total += Fraction(shared, a + b - shared) * Fraction(ways, math.comb(e, b))
    return float(total)


def committee(found: Sequence[Group], m: int | None, share: str) -> dict:
    """`share` as a decimal, so that it compares exactly."""
    rows = {}
    for one, together in grouped(found, lambda g: g.geometry).items():
        e, size = one.n_experts, min(m or one.top_k, one.n_experts)
        sets = [_most_used(g, size) for g in together]
        enough = math.ceil(Fraction(share) * len(sets))
        members = [expert for expert in range(e) if sum(expert in used for used in sets) >= enough]
        chance = Fraction(size, e)
        expected = e * sum(
            math.comb(len(sets), votes) * chance**votes * (1 - chance) ** (len(sets) - votes)
            for votes in range(enough, len(sets) + 1)
        )
        pairs = list(itertools.combinations(sets, 2))
        jaccard = [len(a & b) / len(a | b) for a, b in pairs]
        metrics = {
            "committee_size": (len(members), float(expected)),
            "committee_mass": (np.mean([g.picks[members].sum() / g.picks.sum() for g in together]), len(members) / e),
            "mean_jaccard": (np.mean(jaccard), np.mean([expected_jaccard(e, len(a), len(b)) for a, b in pairs]))
            if pairs
            else (None, None),
        }
        for metric, values in metrics.items():
            tokens = sum(g.tokens for g in together)
            rows[metric, one.stack, one.layer] = (*values, tokens, len(sets), members)
    return rows


def _most_used(group: Group, m: int) -> set[int]:
    order = sorted(range(group.geometry.n_experts), key=lambda expert: (-group.picks[expert], expert))
    return {expert for expert in order[:m] if group.picks[expert]}


def router_entropy(found: Sequence[Group]) -> dict:
    rows = {}
    for g in found:
        for metric, (values, baseline) in _decisiveness(g).items():
            rows[metric, *g.router, g.label] = (values.mean(), baseline, g.tokens)
    return rows


def router_entropy_quantiles(found: Sequence[Group]) -> dict:
    rows = {}
    for g in found:
        for metric, (values, baseline) in _decisiveness(g).items():
            first, median, third = np.quantile(_rounded(values), [0.25, 0.5, 0.75])
            rows[metric, *g.router, g.label] = (median, baseline, g.tokens, first, third)
    return rows


def router_stats(found: Sequence[Decision], *, pooled: bool, stored: Sequence[str]) -> dict:
    rows = {}
    for one, decided in by_router(found).items():
        for label, own in grouped(decided, lambda d: None if pooled else d.label).items():
            baselines = {"weight": 1 / one.top_k, "probability": 1 / one.n_experts, "logit": None}
            values = {"weight": [w / sum(d.weights) for d in own for w in d.weights]}
            for name in stored:
                metric = name.removesuffix("s") if name == "logits" else "probability"
                values[metric] = [x for d in own for x in getattr(d, name)]
                values[f"chosen_{metric}"] = [getattr(d, name)[expert] for d in own for expert in d.experts]
            for metric, each in values.items():
                x = np.array([number for number in each if math.isfinite(number)])
                ordered = np.sort(_rounded(x))
                quantiles = (ordered[math.ceil(share * len(x)) - 1] for share in QUANTILES)
                rows[metric, one.stack, one.layer, label] = (
                    x.mean(), baselines[metric.removeprefix("chosen_")], len(x), x.std(), ordered[0], *quantiles,
                    ordered[-1],
                )  # fmt: skip
    return rows


QUANTILES = (Fraction(1, 20), Fraction(1, 4), Fraction(1, 2), Fraction(3, 4), Fraction(19, 20))


def dynamic_k(found: Sequence[Decision], *, pooled: bool, mass: float, probabilities: bool) -> dict:
    rows = {}
    for one, decided in by_router(found).items():
        for label, own in grouped(decided, lambda d: None if pooled else d.label).items():
            parts = {"weight_k": np.array([d.weights for d in own])}
            if probabilities:
                parts["probability_k"] = np.array([d.probabilities for d in own])
            for metric, x_tn in parts.items():
                needed = _needed(x_tn, mass)
                (baseline,) = _needed(np.ones((1, x_tn.shape[1])), mass)
                shares = [np.mean(needed == count) for count in range(1, one.top_k + 1)]
                rows[metric, one.stack, one.layer, label] = (needed.mean(), baseline, len(own), shares)
    return rows


def _needed(x_tn: np.ndarray, mass: float) -> np.ndarray:
    """[T] how many of each row's largest numbers have this share of its sum, to a part in a million."""
    running_tn = np.cumsum(-np.sort(-x_tn.astype(np.float64), axis=1), axis=1)
    return 1 + np.argmax(running_tn >= mass * (1 - 1e-6) * running_tn[:, -1:], axis=1)


def _decisiveness(g: Group) -> dict[str, tuple[np.ndarray, float]]:
    """Metric -> [T] its values, and its baseline."""
    e, k = g.geometry.n_experts, g.geometry.top_k
    weight_entropy = np.array([entropy(w / w.sum()) for w in g.weights_tk.astype(np.float64)])
    return {
        "router_entropy": (g.statistics["entropy"].astype(np.float64), math.log(e)),
        "weight_entropy": (weight_entropy, math.log(k)),
        "topk_mass": (g.statistics["topk_mass"].astype(np.float64), k / e),
        "margin": (g.statistics["margin"].astype(np.float64), 0),
    }


def _rounded(values: np.ndarray) -> np.ndarray:
    """To 12 significant bits, which those that are recorded have."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.rint(np.ldexp(mantissa, 12)), exponent - 12)


def top_experts(found: Sequence[Group], n: int) -> dict:
    rows = {}
    for g in found:
        for metric, counts in (("top1", g.top1), ("topk", g.picks)):
            order = np.lexsort((np.arange(len(counts)), -counts))
            for rank, expert in enumerate((x for x in order[:n] if counts[x]), start=1):
                value = counts[expert] / counts.sum()
                key = (metric, *g.router, g.label, rank)
                rows[key] = (expert, value, 1 / g.geometry.n_experts, g.tokens, counts[expert])
    return rows


def language_divergence(found: Sequence[Group]) -> dict:
    rows = {}
    for router in dict.fromkeys(g.router for g in found):
        shares = [g.picks / g.picks.sum() for g in found if g.router == router]
        jsd = [
            (entropy((a + b) / 2) - (entropy(a) + entropy(b)) / 2) / math.log(2)
            for a, b in itertools.combinations(shares, 2)
        ]
        if jsd:
            rows["language_divergence", *router] = (np.mean(jsd), 0, len(jsd), *np.quantile(jsd, [0.25, 0.5, 0.75]))
    return rows


def effective_experts(found: Sequence[Group]) -> dict:
    rows = {}
    for g in found:
        e = g.geometry.n_experts
        load_entropy = entropy(g.picks / g.picks.sum())
        running = np.cumsum(np.sort(g.picks)[::-1])
        half = int(np.argmax(2 * running >= g.picks.sum())) + 1
        key = ("effective_experts", *g.router, g.label)
        rows[key] = (math.exp(load_entropy), e, g.tokens, load_entropy, np.count_nonzero(g.picks), half, half / e)
    return rows


def dropped_tokens(found: Sequence[Group]) -> dict:
    rows = {}
    for g in found:
        tokens, picks = int(g.dropped_tk.any(1).sum()), int(g.dropped_tk.sum())
        rows["dropped_tokens", *g.router, g.label] = (tokens / g.tokens, 0, g.tokens, tokens)
        rows["dropped_picks", *g.router, g.label] = (picks / g.experts_tk.size, 0, g.tokens, picks)
    return rows
