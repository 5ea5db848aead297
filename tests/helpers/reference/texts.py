"""Documents, their tokens, single experts, and sentences that several labels have."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from tests.helpers.reference.base import Decision, by_router, entropy, grouped
from tests.helpers.synthetic import Shard


def fertility(shards: Sequence[Shard], *, include_special: bool) -> dict:
    texts = []
    for shard in shards:
        counted = np.split(include_special | ~shard.is_special, np.cumsum(shard.lengths)[:-1])
        truncated = np.zeros(len(shard.documents), bool) if shard.truncated is None else shard.truncated
        for (label, _), own, characters, cut in zip(
            shard.documents, counted, shard.character_counts, truncated, strict=True
        ):
            if own.any():
                texts.append((label, own.sum(), characters, cut))
    if not texts:
        return {}
    everything = _measure(texts)
    labels = grouped(texts, lambda text: text[0])
    rows = {}
    for label, own in labels.items():
        measured = _measure(own)
        for metric, (value, n) in measured.items():
            baseline = len(texts) / len(labels) if metric == "documents" else everything[metric][0]
            tokens, characters = (sum(text[i] for text in own if not text[3]) for i in (1, 2))
            rows[metric, label] = (value, baseline, n, tokens, characters)
    return rows


def nearest_documents(found: Sequence[Decision], n: int, document: str | None = None) -> dict:
    texts = grouped(found, lambda d: (d.shard, d.doc))
    routers = sorted({d.router: d.geometry for d in found}.items())
    signatures = {}
    for name, decided in texts.items():
        shares = []
        for router, geometry in routers:
            picked = [expert for d in decided if d.router == router for expert in d.experts]
            shares.append(np.bincount(picked, minlength=geometry.n_experts) / max(len(picked), 1))
        signatures[name] = np.concatenate(shares) if shares else np.zeros(0)
    labels = {name: decided[0].label for name, decided in texts.items()}
    cosines = {
        (a, b): round(float(x @ y / np.linalg.norm(x) / np.linalg.norm(y)), 12)
        for a, x in signatures.items()
        for b, y in signatures.items()
    }
    rows: dict = {}
    agreements: dict[str, list[float]] = {}
    for name in sorted(texts):
        others = sorted((other for other in texts if other != name), key=lambda other: (-cosines[name, other], other))
        id_ = "synthetic#{}-{}".format(*name)
        if not others or document not in (None, id_):
            continue
        mean = np.mean([cosines[name, other] for other in others])
        for rank, other in enumerate(others[:n], start=1):
            shown = ("synthetic#{}-{}".format(*other), labels[other])
            rows["neighbour_cosine", labels[name], id_, rank] = (cosines[name, other], mean, len(texts), *shown)
        agreement = np.mean([labels[other] == labels[name] for other in others[:n]])
        agreements.setdefault(labels[name], []).append(agreement)
    for label, each in agreements.items():
        chance = (Counter(labels.values())[label] - 1) / (len(texts) - 1)
        rows["label_agreement", label, None, None] = (np.mean(each), chance, len(each), None, None)
    return rows


def _measure(texts: Sequence[tuple]) -> dict:
    whole = [text for text in texts if not text[3]]
    tokens, characters = (sum(text[i] for text in whole) for i in (1, 2))
    return {
        "tokens_per_character": (tokens / characters if whole else None, len(whole)),
        "characters_per_token": (characters / tokens if whole else None, len(whole)),
        "tokens_per_document": (tokens / len(whole) if whole else None, len(whole)),
        "documents": (len(texts), len(texts)),
        "truncated_share": (1 - len(whole) / len(texts), len(texts)),
    }


def token_trace(found: Sequence[Decision], shard: int, doc: int, *, logits: bool = False) -> dict:
    rows = {}
    for d in (d for d in found if (d.shard, d.doc) == (shard, doc)):
        weights = np.array(d.weights)
        rows[f"synthetic#{shard}-{doc}", d.geometry.stack, d.position, d.geometry.layer] = (
            d.token_id, f"token {d.token_id}", d.is_special, d.label, d.top1, d.experts, d.weights,
            d.statistics["entropy"], entropy(weights / weights.sum()), d.statistics["topk_mass"],
            d.statistics["margin"], sum(d.dropped), max(d.logits) if logits else None,
        )  # fmt: skip
    return rows


def expert_profile(found: Sequence[Decision], expert: int, n: int, width: int) -> dict:
    rows = {}
    for one, decided in by_router(found).items():
        own = [d for d in decided if expert in d.experts]
        share = len(own) / len(decided)
        # item -> (order, value, baseline, n, count)
        aspects: dict[str, list] = {"token": [], "label": [], "position": [], "expert": []}
        for aspect, (item_of, name_of, order_of) in _ASPECTS.items():
            counts = Counter(map(item_of, own))
            for item, tokens in Counter(map(item_of, decided)).items():
                count = counts[item]
                order = order_of(item, count, tokens)
                aspects[aspect].append((order, name_of(item), count / tokens, share, tokens, count))
        for other in range(one.n_experts):
            count = sum(other in d.experts for d in own)
            if other != expert and count:
                baseline = np.mean([other in d.experts for d in decided])
                aspects["expert"].append(((-count, other), str(other), count / len(own), baseline, len(own), count))
        aspects["context"] = [
            ((-weight, shard, tok), context, weight, np.mean([_weight(d, expert) for d in own]), len(own), 1)
            for weight, shard, tok, context in _contexts(own, decided, expert, width)
        ]
        for aspect, items in aspects.items():
            kept = sorted(item for item in items if item[-1])[: None if aspect == "position" else n]
            for rank, (_, *cells) in enumerate(kept, start=1):
                rows[aspect, one.stack, one.layer, expert, rank] = tuple(cells)
    return rows


def _weight(decision: Decision, expert: int) -> float:
    return decision.weights[decision.experts.index(expert)]


def _contexts(own: Sequence[Decision], decided: Sequence[Decision], expert: int, width: int) -> list[tuple]:
    """(weight, shard, tok, context) of the strongest token of each document."""
    contexts = []
    for same in grouped(own, lambda d: (d.shard, d.doc)).values():
        best = min(same, key=lambda d: (-_weight(d, expert), d.position))
        around = [
            d
            for d in decided
            if (d.shard, d.doc) == (best.shard, best.doc) and abs(d.position - best.position) <= width
        ]
        words = [f"⟦token {d.token_id}⟧" if d.tok == best.tok else f"token {d.token_id}" for d in around]
        contexts.append((_weight(best, expert), best.shard, best.tok, "".join(words)))
    return contexts


_ASPECTS = {
    "token": (lambda d: d.token_id, lambda x: f"token {x}", lambda x, count, _: (-count, x)),
    "label": (lambda d: d.label, str, lambda x, count, n: (-count / n, x)),
    "position": (
        lambda d: 1 << d.position.bit_length() >> 1,
        lambda x: str(x) if x < 2 else f"{x}-{2 * x - 1}",
        lambda x, *_: x,
    ),
}
"""Aspect -> the item of a decision, how an item is called, how items are ordered."""


def routing_divergence(found: Sequence[Decision], *, probabilities: bool) -> dict:
    rows = {}
    for one, decided in by_router(found).items():
        aligned = [d for d in decided if d.parallel_id is not None]
        q = {
            sentence: np.mean([_distribution(d, probabilities=probabilities) for d in same], axis=0)
            for sentence, same in grouped(aligned, lambda d: (d.parallel_id, d.label)).items()
        }
        pairs = [(a, b, _divergence(q[i, a], q[j, b], one.n_experts)) for i, a in q for j, b in q if i == j and a != b]
        metric = "routing_divergence" if probabilities else "topk_routing_divergence"
        for (a, b), same in grouped(pairs, lambda pair: pair[:2]).items():
            rows[metric, one.stack, one.layer, a, b] = (np.mean([value for *_, value in same]), 0, len(same))
    return rows


def _distribution(decision: Decision, *, probabilities: bool) -> np.ndarray:
    if probabilities:
        return np.array(decision.probabilities)
    p = np.zeros(decision.geometry.n_experts)
    p[decision.experts] = np.array(decision.weights) / np.sum(decision.weights)
    return p


def _divergence(a: np.ndarray, b: np.ndarray, experts: int) -> float:
    a, b = a / a.sum(), b / b.sum()  # float32 probabilities sum to 1 but for rounding
    within = (entropy(a) + entropy(b)) / 2
    most = math.log(experts) - within
    return (entropy((a + b) / 2) - within) / most if most > 1e-9 else 0.0
