"""Draws controls of an intervention: sets of other experts, at random but chosen about as often as those of the arm.

Any edit of a model costs something. An arm says something about its experts only by what it does beyond edits of other
experts in the same layers, with the same operations, that work as much: those of the same decile of frequency and,
where the outputs were recorded, of Σ g‖f‖. Where these deciles hold too few, the neighbouring ones help, two on each
side at most. All controls of an arm differ, so an arm may get fewer than were asked for: fewer are there.
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

DECILES = 10
FARTHEST = 2
"""Deciles on each side of an expert's own from which its controls may come."""
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

    deciles = _deciles(run)
    drawn: list[Arm] = []
    farthest, few = 0, []
    for arm in arms:
        if missing := [edit for edit in arm.edits if (edit.stack, edit.layer) not in deciles]:
            raise ValueError(
                f"--controls: the run did not record {missing[0].stack} layer {missing[0].layer}, which arm "
                f"{arm.name!r} edits: its experts cannot be matched"
            )
        rng = np.random.default_rng([seed, zlib.crc32(arm.name.encode())])
        sets: list[tuple[int, ...]] = []
        for far in range(FARTHEST + 1):
            sets = _draw(rng, _candidates(arm, deciles, far), arm, count)
            if len(sets) == count:
                break
        if not sets:
            raise ValueError(
                f"--controls: no set of other experts is chosen about as often as that of arm {arm.name!r}"
            )
        farthest = max(farthest, far)
        few += [len(sets)] if len(sets) < count else []
        drawn.append(arm)
        for number, experts in enumerate(sets, 1):
            edits = (dataclasses.replace(edit, expert=other) for edit, other in zip(arm.edits, experts, strict=True))
            drawn.append(dataclasses.replace(arm, control=number, edits=tuple[Edit, ...](edits)))
    said = [f"some controls come from deciles of frequency up to {farthest} away"] if farthest else []
    if few:
        least = f"{min(few)} to {max(few)}" if min(few) < max(few) else f"{min(few)}"
        said.append(f"{len(few)} of {len(arms)} arms have {least} controls, because there are no more that match")
    return drawn, said


def _deciles(run: Run) -> dict[tuple[str, int], NDArray[np.int64]]:
    """(stack, layer) -> [measures, E] the decile of each expert, by each measure."""
    statements = [_FREQUENCY] + ([_CONTRIBUTION] if run.has("label_outputs") else [])
    sizes = {(one["stack"], one["layer"]): one["n_experts"] for one in run.info["layers"]}
    values = {at: np.zeros((len(statements), size)) for at, size in sizes.items()}
    for number, statement in enumerate(statements):
        for stack, layer, expert, value in run.sql(statement).fetchall():
            values[stack, layer][number, expert] = value
    ranks = {at: each.argsort(axis=1, kind="stable").argsort(axis=1) for at, each in values.items()}
    return {at: each * DECILES // each.shape[1] for at, each in ranks.items()}


def _candidates(
    arm: Arm, deciles: Mapping[tuple[str, int], NDArray[np.int64]], far: int
) -> list[NDArray[np.int64]]:  # fmt: skip
    """For each edit of an arm, the experts that may stand in its expert's place."""

    def others(edit: Edit) -> NDArray[np.int64]:
        own = deciles[edit.stack, edit.layer]
        alike = (np.abs(own - own[:, [edit.expert]]) <= far).all(axis=0)
        alike[[each.expert for each in arm.edits if (each.stack, each.layer) == (edit.stack, edit.layer)]] = False
        return np.flatnonzero(alike)

    return [others(edit) for edit in arm.edits]


def _draw(
    rng: np.random.Generator, candidates: Sequence[NDArray[np.int64]], arm: Arm, count: int
) -> list[tuple[int, ...]]:  # fmt: skip
    """Draws up to `count` different sets: an expert for each edit, different ones within a layer."""
    found: dict[frozenset[tuple[object, ...]], tuple[int, ...]] = {}
    for _ in range(_TRIES * count):
        if len(found) == count:
            break
        experts = tuple(_one_of_each(rng, candidates, arm.edits))
        if len(experts) == len(arm.edits):
            same = frozenset(
                (edit.stack, edit.layer, edit.operation, edit.value, expert)
                for edit, expert in zip(arm.edits, experts, strict=True)
            )
            found.setdefault(same, experts)
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
