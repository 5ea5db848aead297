"""Which experts, layers and neighbouring tokens go together."""

from __future__ import annotations

import itertools
import math
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from tests.helpers.reference.base import Decision, by_router, grouped


def coactivation(found: Sequence[Decision], mode: str) -> dict:
    rows = {}
    for one, decided in by_router(found).items():
        single = Counter(expert for d in decided for expert in d.experts)
        pairs: Counter[tuple[int, int]] = Counter()
        for d in decided:
            pairs.update(itertools.permutations(d.experts, 2) if mode == "paper" else _neighbours(d))
        for (i, j), together in pairs.items():
            # of the k (k - 1) ordered pairs of picks, released counts 2 (k - 1)
            share = 1 if mode == "paper" else 2 / one.top_k
            baseline = (one.top_k - 1) / (one.n_experts - 1) * share
            metric = "coactivation" if mode == "paper" else "adjacent_coactivation"
            rows[metric, one.stack, one.layer, i, j] = (together / single[i], baseline, single[i], together)
    return rows


def _neighbours(decision: Decision) -> list[tuple[int, int]]:
    order = np.argsort(-np.array(decision.weights), kind="stable")
    ranked = [decision.experts[place] for place in order]
    pairs = list(itertools.pairwise(ranked))
    return pairs + [(b, a) for a, b in pairs]


def expert_token_overlap(found: Sequence[Decision], min_count: int) -> dict:
    rows = {}
    for one, decided in by_router(found).items():
        counts = Counter((expert, d.token_id) for d in decided for expert in d.experts)
        often = [pair for pair, count in counts.items() if count >= min_count]
        received = [{x for e, x in often if e == expert} for expert in range(one.n_experts)]
        ids = len(set().union(*received))
        for i, j in itertools.combinations(range(one.n_experts), 2):
            a, b = len(received[i]), len(received[j])
            if a and b:
                either = len(received[i] | received[j])
                value = len(received[i] & received[j]) / either
                baseline = a * b / ids / (a + b - a * b / ids)
                rows["expert_token_overlap", one.stack, one.layer, i, j] = (value, baseline, either, a, b)
    return rows


def layer_transition(found: Sequence[Decision]) -> dict:
    rows = {}
    for stack, decided in grouped(found, lambda d: d.geometry.stack).items():
        layers = sorted({d.geometry.layer for d in decided})
        top1 = {(d.geometry.layer, d.shard, d.tok): d.top1 for d in decided}
        for layer, following in itertools.pairwise(layers):
            steps = [(expert, top1[following, *token]) for (at, *token), expert in top1.items() if at == layer]
            leaving, arriving = Counter(a for a, _ in steps), Counter(b for _, b in steps)
            for (a, b), together in Counter(steps).items():
                key = ("layer_transition", stack, layer, a, following, b)
                rows[key] = (together / leaving[a], arriving[b] / len(steps), leaving[a], together)
    return rows


def paths(found: Sequence[Decision], n: int, top: int) -> dict:
    rows = {}
    for stack, decided in grouped(found, lambda d: d.geometry.stack).items():
        layers = sorted({d.geometry.layer for d in decided})
        at = {layer: {(d.shard, d.tok): d for d in decided if d.geometry.layer == layer} for layer in layers}
        for window in zip(*(layers[place:] for place in range(n)), strict=False):
            tokens = sorted(at[window[0]])
            path = {token: tuple(at[layer][token].top1 for layer in window) for token in tokens}
            ids = {token: at[window[0]][token].token_id for token in tokens}
            rows |= {("path_share", stack, window[0], *key): row for key, row in _path_rows(path, ids, top).items()}
            each = [_purity({token: at[layer][token].top1 for token in tokens}, ids) for layer in window]
            pairs = list(itertools.combinations(tokens, 2))
            count = len(set(path.values()))
            if pairs:
                chance = np.mean([ids[a] == ids[b] for a, b in pairs])
                same = np.mean([path[a] == path[b] for a, b in pairs])
                chain = _chain([*path.values()])
                drawn = sum(share**2 for share in chain.values())
                rows["same_path", stack, window[0], None] = (None, same, drawn, len(tokens), count, *[None] * 3)
            for metric, (value, tokens_of) in (
                ("path_purity", _purity(path, ids)),
                ("expert_purity", (np.mean([v for v, _ in each if v is not None] or [np.nan]), len(tokens))),
            ):
                if value is not None and not np.isnan(value):
                    rows[metric, stack, window[0], None] = (None, value, chance, tokens_of, count, *[None] * 3)
    return rows


def _path_rows(path: dict, ids: dict, top: int) -> dict:
    """By rank: path, share, that of the chain, N, N_p, purity, token and its share."""
    chain, tokens = _chain([*path.values()]), len(path)
    ranked = sorted(Counter(path.values()).items(), key=lambda item: (-item[1], item[0]))[:top]
    rows = {}
    for rank, (one, count) in enumerate(ranked, start=1):
        own = {token: ids[token] for token in path if path[token] == one}
        token, often = min(Counter(own.values()).items(), key=lambda item: (-item[1], item[0]))
        shown = (_purity(dict.fromkeys(own, one), own)[0], f"token {token}", often / count)
        rows[(rank,)] = ("-".join(map(str, one)), count / tokens, chain[one], tokens, count, *shown)
    return rows


def _chain(paths: list[tuple[int, ...]]) -> dict[tuple[int, ...], float]:
    """The shares of all paths that the chain can take."""
    shares = {(expert,): count / len(paths) for expert, count in Counter(path[0] for path in paths).items()}
    for place in range(len(paths[0]) - 1):
        leaving = Counter(path[place] for path in paths)
        steps = Counter((path[place], path[place + 1]) for path in paths)
        shares = {
            (*path, b): share * count / leaving[a]
            for path, share in shares.items()
            for (a, b), count in steps.items()
            if a == path[-1]
        }
    return shares


def _purity(group: dict, ids: dict) -> tuple[float | None, int]:
    """The chance that another token of the same group has the same id, and over how many tokens it is averaged."""
    chances = []
    for token in group:
        others = [other for other in group if other != token and group[other] == group[token]]
        if others:
            chances.append(np.mean([ids[other] == ids[token] for other in others]))
    return (float(np.mean(chances)), len(chances)) if chances else (None, 0)


def repetition(found: Sequence[Decision]) -> dict:
    rows = {}
    for one, decided in by_router(found).items():
        e, k = one.n_experts, one.top_k
        place = {(d.shard, d.doc, d.position): d for d in decided}
        pairs = [(d, place[s, doc, at + 1]) for (s, doc, at), d in place.items() if (s, doc, at + 1) in place]
        for label, same in grouped(pairs, lambda pair: pair[0].label).items():
            shared = np.array([len(set(a.experts) & set(b.experts)) for a, b in same])
            metrics = {
                "top1_same": (np.mean([a.top1 == b.top1 for a, b in same]), 1 / e),
                "any_shared": (np.mean(shared > 0), 1 - math.comb(e - k, k) / math.comb(e, k)),
                "mean_shared": (shared.mean(), k * k / e),
            }
            for metric, (value, baseline) in metrics.items():
                rows[metric, one.stack, one.layer, label] = (value, baseline, len(same))
    return rows


def routing_locality(found: Sequence[Decision], names: dict, cache: int | None, warm_up: int, seed: int) -> dict:
    """`names`: the id of each document, (shard, doc)."""
    rows = {}
    for one, decided in by_router(found).items():
        size = 2 * one.top_k if cache is None else cache
        counts: dict[str, Counter[str]] = {}
        for document, tokens in grouped(sorted(decided, key=lambda d: d.tok), lambda d: (d.shard, d.doc)).items():
            rng = np.random.default_rng([seed, zlib.crc32(names[document].encode())])
            shuffled = [tokens[place] for place in rng.permutation(len(tokens))]
            for what, order in (("", tokens), ("shuffled ", shuffled)):
                used: list[int] = []  # the last one last
                for token in order[:warm_up]:
                    used = _use(used, token)
                for token in order[warm_up:]:
                    own = counts.setdefault(token.label, Counter())
                    own[what + "picks"] += one.top_k
                    own[what + "hits"] += len(set(used[-size:]) & set(token.experts))
                    own[what + "new"] += len(set(token.experts) - set(used))
                    used = _use(used, token)
        for label, own in counts.items():
            value, baseline = (own[what + "hits"] / own[what + "picks"] for what in ("", "shuffled "))
            key = ("cache_hit_rate", one.stack, one.layer, label)
            rows[key] = (value, baseline, own["picks"], own["new"] / own["picks"], size)
    return rows


def _use(used: list[int], token: Decision) -> list[int]:
    return [expert for expert in used if expert not in token.experts] + token.experts


def position_profile(found: Sequence[Decision]) -> dict:
    rows = {}
    for one, decided in by_router(found).items():
        for label, own in grouped(decided, lambda d: d.label).items():
            for first, bucket in grouped(own, lambda d: 1 << d.position.bit_length() >> 1).items():
                for expert in range(one.n_experts):
                    value, baseline = (np.mean([expert in d.experts for d in each]) for each in (bucket, own))
                    key = ("position_profile", one.stack, one.layer, label, first, expert)
                    rows[key] = (value, baseline, len(bucket), max(2 * first - 1, 0))
    return rows
