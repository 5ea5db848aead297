"""Defines the figures about what experts cause: effects of edits, beside their controls, and what predicts them.

Only runs of `collector intervene`, or with `--record effects`, have them.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from collector.look.report import charts, points
from collector.look.report.figure import Figure
from collector.look.report.tables import fetch, in_labels, span
from collector.query.views import literal

if TYPE_CHECKING:
    from collector.look.report.figure import Subject
    from collector.look.report.tables import Table

CAUSES = "What experts cause"
MAX_ARMS = 60
"""Arms in a figure, those with the largest effects."""
_METRIC = "nats_per_token"


def figures(subject: Subject) -> list[Figure]:
    """Returns the figures that the run has data for, in the order of the page."""
    run = subject.sides[0].run
    if not run.has("document_effects"):
        return []
    found = [_matrix(subject), _controls(subject)]
    if run.has("label_outputs"):
        found.append(_agreement(subject))
    return [figure for figure in found if figure is not None]


def _matrix(subject: Subject) -> Figure | None:
    """The effect of every arm on every language."""
    columns = ("arm", "label", "value", "baseline", "standard_error", "floor", "controls", "p", "q", "n")
    where = f"metric = '{_METRIC}' and {in_labels(subject.labels)}"
    rows = fetch(subject.main, "expert_effect", columns, where=where)
    if len(rows) == 0:
        return None
    arms = _largest(rows)
    kept = rows.only(np.isin(rows["arm"].tolist(), arms))
    labels = {label: place for place, label in enumerate(sorted(set(kept["label"].tolist())))}
    places = {arm: place for place, arm in enumerate(sorted(arms, key=lambda arm: (labels.get(arm, len(labels)), arm)))}
    kept = kept.having(
        _row=[places[arm] for arm in kept["arm"].tolist()], _column=[labels[each] for each in kept["label"].tolist()]
    )
    tested = bool(np.ma.count(kept["q"]))
    tooltip = dict.fromkeys(("value", "baseline", "standard_error", "floor", "controls", "p", "q", "n"), "Q")
    return Figure(
        name="effects",
        section=CAUSES,
        title="What each arm does to each language",
        text="How much worse the model predicts a language's text with the edits of an arm, in nats per token; what it "
        "predicts better is white."
        + (" A dot marks effects that differ from those of the arm's controls (q < 0.05)." if tested else ""),
        draw=functools.partial(
            charts.matrix, x=charts.Side(column="label", count=len(labels)),
            y=charts.Side(column="arm", count=len(arms), title="arm"), title="nats per token",
            high=float(kept["value"].max()), tooltip={"arm": "N", "label": "N"} | tooltip, significant=tested,
        ),
        tables={"rows": kept},
        notes=[f"{span(kept['n'])} tokens of each language.", _floor(kept), *_left_out(rows, arms)],
    )  # fmt: skip


def _controls(subject: Subject) -> Figure | None:
    """The effect of every arm on the label that it is after, beside those of its controls."""
    columns = ("arm", "label", "value", "baseline", "n", "standard_error", "controls", "p", "q")
    found = fetch(subject.main, "effect_specificity", columns, where="metric = 'effect' and target = label")
    if len(found) == 0:
        return None
    arms = _largest(found)
    rows = found.only(np.isin(found["arm"].tolist(), arms))
    order = np.argsort(-rows["value"].astype(float), kind="stable")
    places = {arm: place for place, arm in enumerate(rows["arm"][order].tolist())}
    error = 1.96 * np.ma.filled(rows["standard_error"].astype(float), np.nan)
    rows = rows.having(
        _row=[places[arm] for arm in rows["arm"].tolist()], _low=np.ma.masked_invalid(rows["value"] - error),
        _high=np.ma.masked_invalid(rows["value"] + error),
        _title=[arm if arm == label else f"{arm}: {label}"
                for arm, label in zip(rows["arm"].tolist(), rows["label"].tolist(), strict=True)],
    )  # fmt: skip
    target = dict(zip(rows["arm"].tolist(), rows["label"].tolist(), strict=True))
    title = dict(zip(rows["arm"].tolist(), rows["_title"].tolist(), strict=True))
    pairs = ", ".join(f"({literal(arm)}, {literal(label)})" for arm, label in target.items())
    where = f"control > 0 and (arm, label) in ({pairs})"
    cloud = fetch(subject.main, "control_effects", ("arm", "label", "control", "value", "n"), where=where)
    cloud = cloud.having(
        _row=[places[arm] for arm in cloud["arm"].tolist()], _title=[title[arm] for arm in cloud["arm"].tolist()]
    )
    has_controls = len(cloud) > 0
    drawn = [rows[name] for name in ("value", "_low", "_high")] + ([cloud["value"]] if has_controls else [])
    chosen = sum(arm != label for arm, label in target.items())
    return Figure(
        name="controls",
        section=CAUSES,
        title="Effects beside those of other experts",
        text="What each arm does to the language that it is named after, or hurts most, with its 95 % interval"
        + (", and in grey what its controls do: other experts of the same layers, chosen as often." if has_controls
           else ". The run has no controls, so it is not known what other experts would do: --controls adds them."),
        draw=functools.partial(
            points.clouds, rows=len(places), title="nats per token",
            ends=points.ends_of(*drawn),
        ),
        tables={"rows": rows, "cloud": cloud},
        notes=[f"{span(rows['n'])} tokens; up to {int(rows['controls'].max())} controls of each arm.",
               *([f"{chosen} arms are not named after a language: half of the documents chose theirs, and the interval "
                  "is over the other half."] if chosen else []),
               *_left_out(found, arms)],
    )  # fmt: skip


def _agreement(subject: Subject) -> Figure | None:
    """How well what is observed of experts predicts what the model loses without them."""
    columns = ("observed", "value", "baseline", "standard_error", "n")
    rows = fetch(subject.main, "importance_agreement", columns, where="metric = 'spearman'", pooled=True)
    if len(rows) == 0:
        return None
    mean = {name: float(rows["value"][rows["observed"] == name].mean()) for name in set(rows["observed"].tolist())}
    order = {name: place for place, name in enumerate(sorted(mean, key=lambda name: -mean[name]))}
    routers = sorted(set(rows.routers()))
    names = [f"{layer}" if len(subject.stacks) == 1 else f"{stack} {layer}" for stack, layer in routers]
    rows = rows.having(
        _row=[order[name] for name in rows["observed"].tolist()],
        _column=[routers.index(router) for router in rows.routers()],
        router=[names[routers.index(router)] for router in rows.routers()],
    )
    return Figure(
        name="agreement",
        section=CAUSES,
        title="What predicts the loss without an expert",
        text="Rank correlation over the experts of a layer between what is observed of an expert and what the model "
        "loses without it. Darker predicts better; white is none, or the wrong way round.",
        draw=functools.partial(
            charts.matrix, x=charts.Side(column="router", count=len(routers), title="layer"),
            y=charts.Side(column="observed", count=len(order)), title="Spearman", high=1.0,
            tooltip={"observed": "N", "router": "N"} | dict.fromkeys(("value", "standard_error", "n"), "Q"),
        ),
        tables={"rows": rows},
        notes=[f"{span(rows['n'])} experts of each layer, all languages together."],
    )  # fmt: skip


def _largest(rows: Table) -> list[str]:
    """The arms with the largest effects."""
    most: dict[str, float] = {}
    for arm, value in zip(rows["arm"].tolist(), rows["value"].tolist(), strict=True):
        most[arm] = max(value, most.get(arm, value))
    return sorted(most, key=lambda arm: (-most[arm], arm))[:MAX_ARMS]


def _left_out(rows: Table, arms: list[str]) -> list[str]:
    count = len(set(rows["arm"].tolist()))
    return [f"Only the {len(arms)} arms with the largest effects of {count} are shown."] if count > len(arms) else []


def _floor(rows: Table) -> str:
    floor = rows["floor"]
    if not np.ma.count(floor):
        return "The run did not measure the noise of the arithmetic."
    return f"The noise of the arithmetic is up to {float(floor.max()):.2g} nats per token."
