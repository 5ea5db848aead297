"""Draws controls of an intervention: random sets of experts that are chosen about as often as those of the arm.

Any edit of a model costs something. An arm says something about its experts only by what it does beyond edits of other
sets of experts in the same layers, with the same operations, that work as much. So each expert of the arm gives its
place to one drawn from its class. Classes are parts of a layer with as many experts each: up to ten by frequency or,
where the outputs were recorded, parts by frequency that are parted again by Σ g‖f‖; fewer where a class would have less
than six experts. Where the classes make too few sets, classes of twice and of four times the size do. All sets of an
arm differ, so an arm may get fewer than were asked for: fewer are there.

A set may share an expert with its arm, as two random sets may. The arm is then one more draw from the classes if its
experts are like any others there, which makes p exact (Phipson and Smyth 2010, arXiv 1603.05766). Sets that avoid the
arm's experts share more among themselves than with the arm, and call too many arms special.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from collector.models.edits import Arm, Edit
    from collector.query.warehouse import Run

FEWEST = 6
"""Experts of the smallest class."""
MOST_CLASSES = 10
"""Parts of a layer by one measure."""
_COARSER = (1, 2, 4)
"""Factors by which classes grow where they make too few sets."""
_TRIES = 50
"""Draws for each control, before there are taken to be no more sets."""
_FREQUENCY = "select stack, layer, expert, sum(picks) from assignments where not is_special group by all"
_CONTRIBUTION = "select stack, layer, expert, sum(weighted_norm) from label_outputs where not is_special group by all"


def draw_controls(run: Run, arms: Sequence[Arm], count: int, seed: int) -> tuple[list[Arm], list[str]]:
    """Returns the arms, each followed by its controls, and what is to be said about these.

    Args:
        run: whose counts the experts are matched by.
        arms: without controls.
        count: controls of each arm.
        seed: of the draws; those of an arm depend on this and its name alone.

    Raises:
        ValueError: the run did not record a layer that an arm edits, or an arm has no control at all.
    """
    measures = _measures(run)
    drawn: list[Arm] = []
    coarse, few, kept = 0, [], []
    for arm in arms:
        if missing := [edit for edit in arm.edits if (edit.stack, edit.layer) not in measures]:
            raise ValueError(
                f"--controls: the run did not record {missing[0].stack} layer {missing[0].layer}, which arm "
                f"{arm.name!r} edits: its experts cannot be matched"
            )
        rng = np.random.default_rng([seed, zlib.crc32(arm.name.encode())])
        sets: list[tuple[int, ...]] = []
        for factor in _COARSER:
            found = _draw(rng, _candidates(arm, measures, factor), arm, count)
            if len(found) > len(sets):
                sets, coarser = found, factor > 1
            if len(sets) == count:
                break
        if not sets:
            raise ValueError(
                f"--controls: no other set of experts is chosen about as often as that of arm {arm.name!r}"
            )
        coarse += coarser
        few += [len(sets)] if len(sets) < count else []
        drawn.append(arm)
        for number, experts in enumerate(sets, 1):
            pairs = list(zip(arm.edits, experts, strict=True))
            kept.append(sum(edit.expert == other for edit, other in pairs) / len(pairs))
            edits = tuple(dataclasses.replace(edit, expert=other) for edit, other in pairs)
            drawn.append(dataclasses.replace(arm, control=number, edits=edits))
    said = [f"they share {100 * np.mean(kept):.0f} % of their experts with their arm, as random sets do"]
    if coarse:
        said.append(f"{coarse} of {len(arms)} arms are matched less closely, because closer classes make too few sets")
    if few:
        least = f"{min(few)} to {max(few)}" if min(few) < max(few) else f"{min(few)}"
        said.append(f"{len(few)} of {len(arms)} arms have {least} controls, because there are no more that match")
    return drawn, said


def _measures(run: Run) -> dict[tuple[str, int], NDArray[np.float64]]:
    """(stack, layer) -> [measures, E] what each expert is matched by."""
    statements = [_FREQUENCY] + ([_CONTRIBUTION] if run.has("label_outputs") else [])
    sizes = {(one["stack"], one["layer"]): one["n_experts"] for one in run.info["layers"]}
    values = {at: np.zeros((len(statements), size)) for at, size in sizes.items()}
    for number, statement in enumerate(statements):
        for stack, layer, expert, value in run.sql(statement).fetchall():
            values[stack, layer][number, expert] = value
    return values


def classes_of(measures: NDArray[np.float64], factor: int = 1) -> NDArray[np.int64]:
    """Returns the class of each expert, [E].

    Args:
        measures: [measures, E] one or two.
        factor: how much larger classes are than the smallest ones.
    """
    count = measures.shape[1]
    most = max(1, count // (FEWEST * factor))
    if len(measures) == 1:
        return _parts(measures[0], min(MOST_CLASSES, most))
    by_frequency = min(MOST_CLASSES, math.ceil(math.sqrt(most)))
    class_of = _parts(measures[0], by_frequency)
    within = min(MOST_CLASSES, max(1, most // by_frequency))
    found = np.zeros(count, np.int64)
    for part in range(by_frequency):
        own = np.flatnonzero(class_of == part)
        found[own] = part * within + _parts(measures[1, own], within)
    return found


def _parts(values: NDArray[np.float64], parts: int) -> NDArray[np.int64]:
    """Cuts values into parts with as many each, by size; equal values in their order."""
    return values.argsort(kind="stable").argsort() * parts // len(values)


def _candidates(
    arm: Arm, measures: Mapping[tuple[str, int], NDArray[np.float64]], factor: int
) -> list[NDArray[np.int64]]:  # fmt: skip
    """For each edit of an arm, the experts of its expert's class, itself included."""
    classes = {at: classes_of(measures[at], factor) for at in {(edit.stack, edit.layer) for edit in arm.edits}}
    own = [(classes[edit.stack, edit.layer], edit.expert) for edit in arm.edits]
    return [np.flatnonzero(class_of == class_of[expert]) for class_of, expert in own]


def _draw(
    rng: np.random.Generator, candidates: Sequence[NDArray[np.int64]], arm: Arm, count: int
) -> list[tuple[int, ...]]:  # fmt: skip
    """Draws up to `count` different sets other than the arm's own: an expert for each edit, different in a layer."""

    def content(experts: Sequence[int]) -> frozenset[tuple[object, ...]]:
        return frozenset(
            (edit.stack, edit.layer, edit.operation, edit.value, expert)
            for edit, expert in zip(arm.edits, experts, strict=True)
        )

    own = content([edit.expert for edit in arm.edits])
    found: dict[frozenset[tuple[object, ...]], tuple[int, ...]] = {}
    for _ in range(_TRIES * count):
        if len(found) == count:
            break
        experts = tuple(_one_of_each(rng, candidates, arm.edits))
        if len(experts) == len(arm.edits) and content(experts) != own:
            found.setdefault(content(experts), experts)
    return list(found.values())


def _one_of_each(
    rng: np.random.Generator, candidates: Sequence[NDArray[np.int64]], edits: Sequence[Edit]
) -> Iterable[int]:  # fmt: skip
    """Yields an expert for each edit; ends early where none is left."""
    of: dict[tuple[str, int, int], int] = {}  # several edits of one expert stay edits of one
    for edit, pool in zip(edits, candidates, strict=True):
        own = edit.stack, edit.layer, edit.expert
        if own not in of:
            taken = [expert for (stack, layer, _), expert in of.items() if (stack, layer) == own[:2]]
            left = pool[~np.isin(pool, taken)]
            if not len(left):
                return
            of[own] = int(rng.choice(left))
        yield of[own]
