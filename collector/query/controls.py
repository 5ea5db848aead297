"""Draws controls of an intervention: random sets of experts that are chosen about as often as those of the arm.

Any edit of a model costs something. An arm says something about its experts only by what it does beyond edits of other
sets of experts in the same layers, with the same operations, that work as much. Each expert of the arm is replaced by
one drawn from its class: experts of its layer in the same tenth by frequency and, where the outputs were recorded, by
Σ g‖f‖. Where the classes make too few sets, fifths or thirds do. All sets of an arm differ, so an arm may get fewer
than were asked for: fewer are there.

A set may share experts with its arm, as two random sets may. The arm is then one more draw from the classes if its
experts are like any others there, which makes p exact (Phipson and Smyth 2010, arXiv 1603.05766). Sets that avoid the
arm's experts share more among themselves than with the arm, and call too many arms special.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from collector.models.edits import Arm, Edit
    from collector.query.warehouse import Run

CLASSES = {10: "tenths", 5: "fifths", 3: "thirds"}
"""Classes of a layer's experts by each measure, the finest first."""
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
    from collector.models.edits import Edit

    ranks = _ranks(run)
    drawn: list[Arm] = []
    coarse, few = 0, []
    for arm in arms:
        if missing := [edit for edit in arm.edits if (edit.stack, edit.layer) not in ranks]:
            raise ValueError(
                f"--controls: the run did not record {missing[0].stack} layer {missing[0].layer}, which arm "
                f"{arm.name!r} edits: its experts cannot be matched"
            )
        rng = np.random.default_rng([seed, zlib.crc32(arm.name.encode())])
        sets: list[tuple[int, ...]] = []
        for classes in CLASSES:
            sets = _draw(rng, _candidates(arm, ranks, classes), arm, count)
            if len(sets) == count:
                break
        if not sets:
            raise ValueError(
                f"--controls: no other set of experts is chosen about as often as that of arm {arm.name!r}"
            )
        coarse += classes < max(CLASSES)
        few += [len(sets)] if len(sets) < count else []
        drawn.append(arm)
        for number, experts in enumerate(sets, 1):
            edits = (dataclasses.replace(edit, expert=other) for edit, other in zip(arm.edits, experts, strict=True))
            drawn.append(dataclasses.replace(arm, control=number, edits=tuple[Edit, ...](edits)))
    said = (
        [f"{coarse} of {len(arms)} arms are matched by fifths or thirds of their layer, not tenths"] if coarse else []
    )
    if few:
        least = f"{min(few)} to {max(few)}" if min(few) < max(few) else f"{min(few)}"
        said.append(f"{len(few)} of {len(arms)} arms have {least} controls, because there are no more that match")
    return drawn, said


def _ranks(run: Run) -> dict[tuple[str, int], NDArray[np.int64]]:
    """(stack, layer) -> [measures, E] the rank of each expert, by each measure."""
    statements = [_FREQUENCY] + ([_CONTRIBUTION] if run.has("label_outputs") else [])
    sizes = {(one["stack"], one["layer"]): one["n_experts"] for one in run.info["layers"]}
    values = {at: np.zeros((len(statements), size)) for at, size in sizes.items()}
    for number, statement in enumerate(statements):
        for stack, layer, expert, value in run.sql(statement).fetchall():
            values[stack, layer][number, expert] = value
    return {at: each.argsort(axis=1, kind="stable").argsort(axis=1) for at, each in values.items()}


def _candidates(
    arm: Arm, ranks: Mapping[tuple[str, int], NDArray[np.int64]], classes: int
) -> list[NDArray[np.int64]]:  # fmt: skip
    """For each edit of an arm, the experts of its expert's class, itself included."""

    def alike(edit: Edit) -> NDArray[np.int64]:
        own = ranks[edit.stack, edit.layer]
        class_of = own * classes // own.shape[1]
        return np.flatnonzero((class_of == class_of[:, [edit.expert]]).all(axis=0))

    return [alike(edit) for edit in arm.edits]


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
