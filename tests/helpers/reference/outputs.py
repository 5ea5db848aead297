"""What experts put out, and how well the model predicts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from scipy.stats import binom

from collector.capture.vocabulary import PROMOTED
from collector.store.tables import Layer
from tests.helpers.synthetic import EFFECTS, Shard, components, key, token_stacks

_EPSILON = 1e-300


def effects(layers: Sequence[Layer], shards: Sequence[Shard], *, include_special: bool, pooled: bool = False) -> dict:
    """{(stack, layer, label): (Layer, tokens, picks, norm, squared norm, g norm, contribution, each [E])}."""
    found = {}
    for one in layers:
        for label in sorted({str(label) for shard in shards for label in shard.labels}) if not pooled else [None]:
            tokens, sums_ne = 0, np.zeros((5, one.n_experts))
            for shard in shards:
                counted = (include_special | ~shard.is_special) & (pooled | (shard.labels == label))
                tokens += int(counted.sum())
                lost = shard.dropped.get(key(one), np.zeros((len(counted), one.top_k), bool))
                kept = counted[:, None] & ~lost
                norm, _, c = (shard.effects[key(one)][name][kept].astype(float) for name in EFFECTS)
                g, e = shard.weights[key(one)][kept].astype(float), shard.experts[key(one)][kept].astype(int)
                for i, values in enumerate((np.ones(len(e)), norm, norm**2, g * norm, c)):
                    np.add.at(sums_ne[i], e, values)
            if tokens:
                found[one.stack, one.layer, label] = (one, tokens, *sums_ne)
    return found


def expert_contribution(layers: Sequence[Layer], shards: Sequence[Shard], **given: bool) -> dict:
    """See the query."""
    rows = {}
    for at, (one, tokens, picks, norm, squared, weighted, c) in effects(layers, shards, **given).items():
        everywhere = picks.sum()
        for e in range(one.n_experts):
            n = int(picks[e])
            of_picks = {"saliency": weighted, "activation_norm": norm, "squared_activation_norm": squared}
            metrics = {
                "contribution": (c[e] / tokens, 1 / one.n_experts, tokens),
                "contribution_if_chosen": (c[e] / n if n else None, 1 / one.top_k, n),
                "ean": (norm[e] / tokens, norm.mean() / tokens, tokens),
                "weighted_ean": (weighted[e] / tokens, weighted.mean() / tokens, tokens),
            }
            for name, values in of_picks.items():
                baseline = values.sum() / everywhere if everywhere else None
                metrics[name] = (values[e] / n if n else None, baseline, n)
            rows |= {(metric, *at, e): row for metric, row in metrics.items()}
    return rows


def contribution_specialization(layers: Sequence[Layer], shards: Sequence[Shard], *, include_special: bool) -> dict:
    """See the query."""
    found = effects(layers, shards, include_special=include_special)
    rows = {}
    for (stack, layer, label), (one, tokens, picks, *_, c) in found.items():
        own = np.maximum(c, 0) / tokens
        of_labels = [np.maximum(other[-1], 0) / other[1] for at, other in found.items() if at[:2] == (stack, layer)]
        total = np.sum(of_labels, axis=0)
        for e in range(one.n_experts):
            exclusivity = own[e] / total[e] if total[e] > 0 else None
            rows["contribution_specialization", stack, layer, label, e] = (
                own[e], 1 / one.n_experts, tokens, int(picks[e]), exclusivity, 1 / len(of_labels),
                None if exclusivity is None else exclusivity * len(of_labels),
            )  # fmt: skip
    return rows


def contribution_overlap(layers: Sequence[Layer], shards: Sequence[Shard], *, include_special: bool) -> dict:
    """See the query."""
    found = {
        at: (tokens, np.maximum(sums[-1], 0) / tokens)
        for at, (_, tokens, *sums) in effects(layers, shards, include_special=include_special).items()
    }
    rows = {}
    for (stack, layer, a), (n_a, c_a) in found.items():
        for (other_stack, other_layer, b), (n_b, c_b) in found.items():
            if (stack, layer) != (other_stack, other_layer):
                continue
            length, most = np.sqrt((c_a @ c_a) * (c_b @ c_b)), np.maximum(c_a, c_b).sum()
            known = c_a.sum() > 0 and c_b.sum() > 0
            s_a, s_b = c_a / max(c_a.sum(), _EPSILON), c_b / max(c_b.sum(), _EPSILON)
            metrics = {
                "cosine": (c_a @ c_b / length if length else None, None),
                "jsd": ((_to_mean(s_a, s_b) + _to_mean(s_b, s_a)) / 2 if known else None, 0),
                "weighted_jaccard": (np.minimum(c_a, c_b).sum() / most if most else None, None),
            }
            for metric, values in metrics.items():
                rows[metric, stack, layer, a, b] = (*values, min(n_a, n_b), n_a, n_b)
    return rows


def _to_mean(p: np.ndarray, q: np.ndarray) -> float:
    has = p > 0
    return float((p[has] * np.log2(2 * p[has] / (p[has] + q[has]))).sum())


def largest(layers: Sequence[Layer], shards: Sequence[Shard], *, include_special: bool) -> dict:
    """{stack: {(layer, expert): (largest entry, picks)}}."""
    found: dict[str, dict] = {}
    for one in layers:
        for shard in shards:
            lost = shard.dropped.get(key(one), np.zeros((len(shard.labels), one.top_k), bool))
            for t, k in np.argwhere((include_special | ~shard.is_special)[:, None] & ~lost):
                at = one.layer, int(shard.experts[key(one)][t, k])
                most, n = found.setdefault(one.stack, {}).get(at, (-np.inf, 0))
                found[one.stack][at] = (max(most, float(shard.effects[key(one)]["largest"][t, k])), n + 1)
    return found


def super_experts(
    layers: Sequence[Layer], shards: Sequence[Shard], *, include_special: bool, percentile: float, share: float,
    depth: float, top: int,
) -> dict:  # fmt: skip
    """See the query."""
    rows = {}
    for stack, experts in largest(layers, shards, include_special=include_special).items():
        values = np.array([value for value, _ in experts.values()])
        baseline, deepest = np.quantile(values, percentile / 100), depth * (1 + max(layer for layer, _ in experts))
        ranked = sorted(experts.items(), key=lambda item: (-item[1][0], item[0]))
        for place, ((layer, expert), (value, n)) in enumerate(ranked[:top], start=1):
            is_super = value > baseline and value > share * values.max() and layer < deepest
            rows["super_experts", stack, layer, expert] = (value, baseline, n, place, bool(is_super))
    return rows


def loss(layers: Sequence[Layer], shards: Sequence[Shard], *, include_special: bool) -> dict:
    """See the query; of the decoder's tokens."""
    if all(one.token_stack == "encoder" for one in layers):
        return {}
    found: dict[str, list[float]] = {}
    for shard in shards:
        end = np.cumsum(shard.lengths)
        truncated = np.zeros(len(end), bool) if shard.truncated is None else shard.truncated
        for d, (label, length) in enumerate(shard.documents):
            own = slice(int(end[d]) - length, int(end[d]))
            predicted = ~np.isnan(shard.losses[own])
            counted = predicted & (include_special | ~shard.is_special[own])
            nats, ordinary = shard.losses[own].astype(float)[counted].sum(), predicted & ~shard.is_special[own]
            whole = not truncated[d]
            characters = int(shard.character_counts[d]) if whole and ordinary.any() else 0
            if counted.any():
                sums = found.setdefault(label, [0, 0, 0, 0])
                added = (int(counted.sum()), nats, nats if whole else 0, characters)
                found[label] = [a + b for a, b in zip(sums, added, strict=True)]
    if not found:
        return {}
    all_n, all_nats, all_whole, all_characters = np.sum(list(found.values()), axis=0)
    rows = {}
    for label, (n, nats, whole, characters) in found.items():
        per_character = whole / np.log(2) / characters if characters else None
        baseline = all_whole / np.log(2) / all_characters if all_characters else None
        rows |= {
            ("nats_per_token", "decoder", label): (nats / n, all_nats / all_n, n),
            ("perplexity", "decoder", label): (np.exp(nats / n), np.exp(all_nats / all_n), n),
            ("bits_per_character", "decoder", label): (per_character, baseline, n),
        }
    return rows


def expert_similarity(shards: Sequence[Shard], *, measure: str, over: str) -> dict:
    """See the query."""
    blocks: dict[tuple, dict[tuple, list[float]]] = {}
    for number, shard in enumerate(shards):
        massive = {(row["stack"], row["layer"], row["block"]) for row in shard.similarity if row["over"] == "usual"}
        for row in shard.similarity:
            at = row["stack"], row["layer"], row["block"]
            if row["over"] != (over if over != "usual" or at in massive else "sampled"):
                continue
            pair = 0
            for i in range(row["experts"]):
                for j in range(i + 1, row["experts"]):
                    n = row["n"][pair]
                    x, y, z = (np.float32(row[name][pair]) for name in ("hsic", "hsic_first", "hsic_second"))
                    values = [n, x, y, z] if measure == "cka" else [n, np.float32(row[measure][pair]), n, n]
                    if n >= (4 if measure == "cka" else 1):
                        for key_columns in ((*at[:2], i, j), (*at[:2], j, i)):
                            own = blocks.setdefault(key_columns, {})
                            own[number, row["block"]] = [float(value) for value in values]
                    pair += 1
    rows = {}
    for at, own in blocks.items():
        sums = np.array(list(own.values()))
        total = sums.sum(0)
        without = [_ratio(total - each) for each in sums]
        error = None
        if len(sums) > 1 and None not in without:
            error = np.sqrt((len(sums) - 1) / len(sums) * ((np.array(without) - np.mean(without)) ** 2).sum())
        baseline = 0.5 if measure == "angular" else 0.0
        rows["expert_similarity", *at] = (_ratio(total), baseline, int(total[0]), len(sums), error)
    return rows


def _ratio(sums: np.ndarray) -> float | None:
    _, x, y, z = sums
    below = np.sqrt(max(y, 0) * max(z, 0))
    return x / below if below > 0 else None


def compute(layers: Sequence[Layer], shards: Sequence[Shard], *, include_special: bool) -> dict:
    """See the query; token by token."""
    rows: dict[tuple, list] = {}
    usual, parts = max(one.top_k for one in layers), components(layers)
    by_name = {(one.stack, one.layer): one for one in layers}
    for stack in token_stacks(layers):
        own = [part for part in parts if part["stack"].partition(".")[0] == stack]
        sums: dict[tuple[str, str], np.ndarray] = {}
        tokens: dict[str, int] = {}
        whole: dict[str, np.ndarray] = {}
        for shard in shards:
            end = np.cumsum(shard.lengths)
            truncated = np.zeros(len(end), bool) if shard.truncated is None else shard.truncated
            for d, (label, length) in enumerate(shard.documents):
                counted = [t for t in range(end[d] - length, end[d]) if include_special or not shard.is_special[t]]
                if counted and not truncated[d]:
                    added = np.array([len(counted), shard.character_counts[d]])
                    whole[label] = whole.get(label, np.zeros(2)) + added
                for t in counted:
                    tokens[label] = tokens.get(label, 0) + 1
                    seen = length if stack == "encoder" else t - (end[d] - length) + 1
                    for part in own:
                        times, experts = 1.0, part["experts"] or 1
                        if part["component"] == "experts":
                            times = _computed(by_name.get((part["stack"], part["layer"])), shard, t, experts, usual)
                        context = part["context_flops"] * min(seen, part["window"] or seen)
                        flops = times * part["flops"] + context
                        active = times * part["parameters"] / experts
                        for component in (part["component"], "total"):
                            at = label, component
                            sums[at] = sums.get(at, np.zeros(2)) + np.array([flops, active])
        for (label, component), (flops, active) in sums.items():
            n = tokens[label]
            every = [other for other in tokens if (other, component) in sums]
            all_n = sum(tokens[other] for other in every)
            per_character = {each: counts[0] / counts[1] for each, counts in whole.items() if counts[1]}
            costs = {each: sums[each, component][0] * per_character[each] for each in every if each in per_character}
            base = sum(sums[other, component][0] for other in every) / all_n
            parameters = sum(part["parameters"] for part in own if component in (part["component"], "total"))
            rows["flops_per_token", stack, label, component] = [flops / n, base, n]
            rows["active_parameters", stack, label, component] = [active / n, parameters, n]
            cost = costs[label] / n if label in costs else None
            rows["flops_per_character", stack, label, component] = [
                cost,
                sum(costs.values()) / all_n if costs else None,
                n,
            ]
    return rows


def _computed(layer: Layer | None, shard: Shard, t: int, experts: int, usual: int) -> float:
    if layer is None:
        return float(usual)
    picks = int((shard.experts[key(layer)][t] < experts).sum())
    return picks - float(shard.dropped[key(layer)][t].sum()) if layer.has_capacity else picks


def sampled_picks(shards: Sequence[Shard]) -> Iterator[dict]:
    """The rows of the table, with the shard, document and label of each."""
    for number, shard in enumerate(shards):
        doc = np.repeat(np.arange(len(shard.documents)), shard.lengths)
        for row in shard.promotions:
            d = int(doc[row["tok"]])
            promoted = [row[name] for name in PROMOTED]
            yield row | {"shard": number, "doc": d, "label": shard.documents[d][0], "promoted": promoted}


def _by(rows: Iterable[dict], *names: str) -> dict[tuple, list[dict]]:
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def output_vocabulary(shards: Sequence[Shard], n: int) -> dict:
    """See the query."""
    rows = {}
    for (stack, layer), everyone in _by(sampled_picks(shards), "stack", "layer").items():
        everywhere = Counter(token for pick in everyone for token in pick["promoted"])
        for (expert,), own in _by(everyone, "expert").items():
            counts = Counter(token for pick in own for token in pick["promoted"])
            share = {token: count / len(own) for token, count in counts.items()}
            baseline = {token: everywhere[token] / len(everyone) for token in counts}
            rate = {token: share[token] * math.log(share[token] / baseline[token]) for token in counts}
            order = sorted(counts, key=lambda token: (-round(rate[token], 12), -counts[token], token))
            for rank, token in enumerate(order[:n], start=1):
                rows["output_vocabulary", stack, layer, expert, rank] = (
                    token, f"token {token}", share[token], baseline[token], len(own), counts[token],
                )  # fmt: skip
    return rows


def output_specialization(shards: Sequence[Shard]) -> dict:
    """See the query; the baseline by scipy's binomial distribution, over all that could be drawn."""
    rows = {}
    for (stack, layer), everyone in _by(sampled_picks(shards), "stack", "layer").items():
        everywhere = Counter(token for pick in everyone for token in pick["promoted"])
        tokens = sorted(everywhere)
        q = np.array([everywhere[token] for token in tokens]) / everywhere.total()
        for (expert,), own in _by(everyone, "expert").items():
            counts = Counter(token for pick in own for token in pick["promoted"])
            draws = counts.total()
            value = _jsd_terms(np.array([counts[token] for token in tokens]) / draws, q).sum()
            possible = np.arange(draws + 1)
            baseline = sum(
                binom.pmf(possible, draws, share) @ _jsd_terms(possible / draws, np.full(draws + 1, share))
                for share in q
            )
            rows["output_specialization", stack, layer, expert] = (value, baseline, len(own))
    return rows


def _jsd_terms(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    m = (p + q) / 2
    return (p * np.log2(np.where(p > 0, p, m) / m) + q * np.log2(q / m)) / 2


def direct_attribution(shards: Sequence[Shard], *, pooled: bool) -> dict:
    """See the query; the standard error by the same linearization, pick by pick."""
    picks = [pick for pick in sampled_picks(shards) if pick["attribution"] is not None]
    for same in _by(picks, "shard", "stack", "layer", "tok").values():
        for pick in same:
            others = [other["attribution"] for other in same if other is not pick]
            pick["others"] = np.mean(others) if others else None
            pick["label"] = None if pooled else pick["label"]
    rows = {}
    for (stack, layer, label, expert), own in _by(picks, "stack", "layer", "label", "expert").items():
        value = np.mean([pick["attribution"] for pick in own])
        accompanied = [pick["others"] for pick in own if pick["others"] is not None]
        baseline = np.mean(accompanied) if accompanied else None
        texts = _by(own, "shard", "doc")
        deviations = [
            sum(
                (pick["attribution"] - value) / len(own)
                - (0 if pick["others"] is None else (pick["others"] - baseline) / len(accompanied))
                for pick in text
            )
            for text in texts.values()
        ]
        error = math.sqrt(sum(x * x for x in deviations)) if len(texts) > 1 else None
        rows["direct_attribution", stack, layer, label, expert] = (value, baseline, len(own), len(texts), error)
    return rows
