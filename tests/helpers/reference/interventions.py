"""What edits of the routing do to predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import false_discovery_control, spearmanr

from collector.models.edits import NO_EDIT, parse_arm
from collector.store.tables import Layer
from tests.helpers.reference import outputs
from tests.helpers.reference.base import groups
from tests.helpers.synthetic import Shard, arms_of

Pairs = dict[tuple[int, int], tuple[float, float]]
"""(shard, document) -> x and y of a ratio of sums."""


def effects(shards: Sequence[Shard], metric: str, *, pooled: bool) -> dict[tuple[str, int, str | None], Pairs]:
    """{(arm, control, label): the documents that the metric says something of}."""
    found: dict[tuple[str, int, str | None], Pairs] = {}
    for number, shard in enumerate(shards):
        for row in shard.arms:
            doc = row["doc"]
            change = row["loss"] - row["base_loss"]
            cut = shard.truncated is not None and bool(shard.truncated[doc])
            x, y = {
                "nats_per_token": (change, row["tokens"]), "divergence": (row["divergence"], row["tokens"]),
                "flips": (row["flips"], row["tokens"]), "rerouted": (row["rerouted"], row["decisions"]),
                "bits_per_character": (change / math.log(2), 0 if cut else int(shard.character_counts[doc])),
            }[metric]  # fmt: skip
            if y > 0:
                label = None if pooled else shard.documents[doc][0]
                found.setdefault((row["arm"], row["control"], label), {})[number, doc] = (x, y)
    return found


METRICS = ("nats_per_token", "bits_per_character", "divergence", "flips", "rerouted")


def expert_effect(shards: Sequence[Shard], *, pooled: bool) -> dict:
    """See the query."""
    rows: dict[tuple, list] = {}
    for metric in METRICS:
        found = effects(shards, metric, pooled=pooled)
        for (arm, control, label), own in found.items():
            if control or arm == NO_EDIT:
                continue
            x, y = _columns(own)
            controls = [
                np.array([other[at][0] for at in own])
                for (name, number, of), other in found.items()
                if (name, of) == (arm, label) and number
            ]
            value, error = _ratio(x, y)
            difference, difference_error, p = None, None, None
            values = [each.sum() / y.sum() for each in controls]
            if controls:
                difference, difference_error = _ratio(x - np.mean(controls, axis=0), y)
                middle = np.mean([value, *values])
                as_far = sum(abs(each - middle) >= abs(value - middle) * (1 - 1e-12) for each in values)
                p = (1 + as_far) / (1 + len(values))
            noise, noise_error = _ratio(*_columns(found[NO_EDIT, 0, label]))
            floor = abs(noise) + 1.96 * (noise_error or 0)
            rows[metric, arm, label] = [
                value, np.mean(values) if values else 0, int(y.sum()), len(x), error, len(values), difference,
                difference_error, p, None, floor, abs(value) > floor,
            ]  # fmt: skip
    _adjust(rows, p=8)
    return {at: tuple(row) for at, row in rows.items()}


def control_effects(shards: Sequence[Shard], *, of: str, pooled: bool) -> dict:
    """See the query."""
    found = {at: _columns(own).sum(1) for at, own in effects(shards, of, pooled=pooled).items() if at[0] != NO_EDIT}
    rows = {}
    for (arm, control, label), (x, y) in found.items():
        controls = [each[0] / each[1] for at, each in found.items() if (at[0], at[2]) == (arm, label) and at[1]]
        rows[of, arm, label, control] = (x / y, np.mean(controls) if controls else None, int(y))
    return rows


def effect_specificity(shards: Sequence[Shard], *, of: str, split: bool) -> dict:
    """See the query."""
    found = effects(shards, of, pooled=False)
    labels = {label for shard in shards for label, _ in shard.documents}
    specific: dict[tuple[str, int], list] = {}
    rows: dict[tuple, list] = {}
    for arm, control in sorted({at[:2] for at in found} - {(NO_EDIT, 0)}):
        by_label = {at[2]: sorted(pairs.items()) for at, pairs in found.items() if at[:2] == (arm, control)}
        halves = split and arm not in labels
        chosen = {label: dict(pairs[0 :: 2 if halves else 1]) for label, pairs in by_label.items()}
        kept = {label: dict(pairs[1::2] if halves else pairs) for label, pairs in by_label.items()}
        target = max(sorted(chosen), key=lambda label: _ratio(*_columns(chosen[label]))[0])
        target = arm if arm in labels else target
        evaluated = {label: (*_ratio(*_columns(own)), *_sizes(own)) for label, own in kept.items() if own}
        others = [row for label, row in evaluated.items() if label != target]
        for label, (value, error, n, count) in evaluated.items():
            rows["effect", arm, control, label] = [value, n, count, error, target]
        if target in evaluated and others:
            value, error, *_ = evaluated[target]
            errors = [other[1] for other in others]
            known = None not in (error, *errors)
            total = math.sqrt(error**2 + sum(each**2 for each in errors) / len(others) ** 2) if known else None
            specific[arm, control] = [
                value - np.mean([other[0] for other in others]), sum(row[2] for row in evaluated.values()),
                sum(row[3] for row in evaluated.values()), total, target,
            ]  # fmt: skip
    answers: dict[tuple, list] = {}
    for (metric, arm, control, label), (value, n, count, error, target) in rows.items():
        if control == 0:
            same = [row[0] for at, row in rows.items() if at[2] > 0 and (at[0], at[1], at[3]) == (metric, arm, label)]
            answers[metric, arm, label] = [value, np.mean(same) if same else 0, n, count, error, target, len(same),
                                           None, None]  # fmt: skip
    for (arm, control), (value, n, count, error, target) in specific.items():
        if control == 0:
            same = [row[0] for at, row in specific.items() if at[1] > 0 and at[0] == arm]
            p = (1 + sum(each >= value for each in same)) / (1 + len(same)) if same else None
            answers["specificity", arm, target] = [value, np.mean(same) if same else 0, n, count, error, target,
                                                   len(same), p, None]  # fmt: skip
    _adjust(answers, p=7)
    return {at: tuple(row) for at, row in answers.items()}


def importance_agreement(layers: Sequence[Layer], shards: Sequence[Shard], *, share: float, pooled: bool) -> dict:
    """See the query."""
    single = {arm.name: arm.edits[0] for arm in map(parse_arm, arms_of(layers))
              if not arm.control and len(arm.edits) == 1 and arm.edits[0].operation == "drop"}  # fmt: skip
    rows = {}
    changes = effects(shards, "nats_per_token", pooled=pooled)
    for (stack, layer, label), observed in _observed(layers, shards, pooled=pooled).items():
        lost = {
            edit.expert: _ratio(*_columns(changes[arm, 0, label]))[0]
            for arm, edit in single.items()
            if (edit.stack, edit.layer) == (stack, layer) and (arm, 0, label) in changes
        }
        for name, of_expert in observed.items():
            experts = [e for e in sorted(lost) if of_expert[e] is not None]
            x, y = np.array([of_expert[e] for e in experts]), np.array([lost[e] for e in experts])
            if len(x) < 2 or len(set(x)) == 1 or len(set(y)) == 1:
                continue
            rows["spearman", name, stack, layer, label] = (
                spearmanr(x, y).statistic, 0, len(x), 1 / math.sqrt(len(x) - 1)
            )  # fmt: skip
            most = np.argsort(-y, kind="stable")[: math.ceil(share * len(x))]
            matters = np.isin(np.arange(len(x)), most)
            squares = sum(((part - part.mean()) ** 2).sum() for part in (x[matters], x[~matters]) if len(part))
            if matters.any() and not matters.all() and len(x) > 2 and squares > 0:
                d = (x[matters].mean() - x[~matters].mean()) / math.sqrt(squares / (len(x) - 2))
                rows["cohens_d", name, stack, layer, label] = (d, 0, len(x), None)
    return rows


def _observed(layers: Sequence[Layer], shards: Sequence[Shard], *, pooled: bool) -> dict[tuple, dict[str, list]]:
    """{(stack, layer, label): {metric: [E] values, None for none}}."""
    by_label: dict[tuple, list] = {}
    for group in groups(layers, shards, include_special=False):
        sums = [group.picks, group.top1, group.weight_sums]
        by_label[(*group.router, group.label)] = [group.tokens, *(np.asarray(each, float) for each in sums)]
    everything: dict[tuple, list] = {}
    for (*router, _), row in by_label.items():
        at = tuple(router)
        everything[at] = row if at not in everything else [a + b for a, b in zip(everything[at], row, strict=True)]
    written = outputs.effects(layers, shards, include_special=False, pooled=pooled)
    shares = {at: np.array([row[1] / row[0] for key, row in by_label.items() if key[:2] == at]) for at in everything}
    found = {}
    for at, row in ({(*at, None): row for at, row in everything.items()} if pooled else by_label).items():
        tokens, picks, top1, weights = row
        _, _, computed, norm, _, weighted, contribution = written[at]
        part_le = shares[at[:2]] / np.maximum(shares[at[:2]].sum(0), 1e-300)
        entropies = -(part_le * np.log(np.where(part_le > 0, part_le, 1))).sum(0)
        most = math.log(len(part_le))
        overall = shares[at[:2]].mean(0)
        found[at] = {
            "frequency": list(picks / tokens), "top1": list(top1 / tokens), "weight": list(weights / tokens),
            "weight_if_chosen": _divided(weights, picks),
            "lift": [None] * len(picks) if pooled else _divided(picks / tokens, overall),
            "selectivity": [1 - h / most if most and f > 0 else None for h, f in zip(entropies, overall, strict=True)],
            "contribution": list(contribution / tokens), "saliency": _divided(weighted, computed),
            "activation_norm": _divided(norm, computed), "ean": list(norm / tokens),
            "weighted_ean": list(weighted / tokens),
        }  # fmt: skip
    return found


def _divided(x: np.ndarray, y: np.ndarray) -> list[float | None]:
    return [float(a / b) if b else None for a, b in zip(x, y, strict=True)]


def _columns(own: Pairs) -> np.ndarray:
    return np.array(list(own.values()), float).T


def _sizes(own: Pairs) -> tuple[int, int]:
    return int(sum(y for _, y in own.values())), len(own)


def _ratio(x: np.ndarray, y: np.ndarray) -> tuple[float, float | None]:
    """The ratio of sums, and its error with the documents as units."""
    value = x.sum() / y.sum()
    return value, math.sqrt(((x - y * value) ** 2).sum()) / y.sum() if len(x) > 1 else None


def _adjust(rows: dict[Any, list], *, p: int) -> None:
    """Puts Benjamini and Hochberg's q behind p."""
    tested = {at: row[p] for at, row in rows.items() if row[p] is not None}
    for at, q in zip(tested, false_discovery_control([*tested.values()]) if tested else [], strict=True):
        rows[at][p + 1] = q
