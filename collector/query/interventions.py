"""Prepares an intervention: the settings of a run that repeats documents of another one with edits of the routing.

found = prepare_intervention("runs/olmoe", "language_experts", controls=99, split=True)
config = resolve(data=found.data, model=found.model, capture=found.capture, device="cpu")
collect_in_process("runs/dropped", config, part_of=found.part_of)
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from collector.config import CaptureConfig, DataConfig, ModelConfig, section
from collector.data.plan import PartOf, Plan
from collector.models.edits import check, tell_arm
from collector.query.arms import read_arms
from collector.query.controls import draw_controls
from collector.query.selection import ALL, half, selected_rows
from collector.query.warehouse import open_run
from collector.store.run_directory import PLAN, RunDirectory

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from collector.config import Store
    from collector.models.edits import Arm
    from collector.query.warehouse import Run

PASSES_PER_SHARD = 1 << 14
"""Documents times arms in a shard, about; a shard takes minutes then, not hours."""
FEWEST_DOCUMENTS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Intervention:
    """What is to be collected."""

    data: DataConfig
    model: ModelConfig
    capture: CaptureConfig
    part_of: PartOf
    said: Sequence[str]
    """What is to be said about the run and the controls."""


def prepare_intervention(
    root: str | os.PathLike[str],
    arms: str,
    *,
    controls: int = 0,
    seed: int = 0,
    documents: str | None = None,
    split: bool = False,
    docs_per_shard: int | None = None,
    store: Sequence[Store] = (),
) -> Intervention:
    """Reads the arms, draws their controls, and selects the documents.

    Args:
        root: the run whose documents and model are used.
        arms: see `read_arms`.
        controls: of each arm.
        seed: of the controls.
        documents: SQL that selects documents, see `selected_rows` (default: all).
        split: test experts in the first half of the documents and measure in the second, see `selection`.
        docs_per_shard: documents per shard (default: those of the run, fewer where there are many arms).
        store: what else to store; what experts put out is recorded if the run has it.

    Raises:
        FileNotFoundError: there is no run, or no such arms.
        ValueError: arms, labels or documents are not usable.
    """
    for name, number, least in (("controls", controls, 0), ("seed", seed, 0), ("docs-per-shard", docs_per_shard, 1)):
        if number is not None and number < least:
            raise ValueError(f"--{name} takes a number from {least}, got {number}")
    run = open_run(root)
    if imported := run.info.get("imported"):
        raise ValueError(f"{root} was imported from {imported['from']}: it has no texts and no model to run again")
    plan = Plan.from_parquet(RunDirectory(root).store.read(PLAN))
    _require_given_texts(plan, root)
    found = read_arms(run, arms, split=split)
    _check(run, found)
    said = [] if run.complete else [f"{root} is not complete: arms and controls come from what it has"]
    run.check(labels=sorted({arm.limits[0] for arm in found if arm.limits[0] is not None}))
    if controls:
        found, remarks = draw_controls(run, found, controls, seed)
        said += [f"controls: {remark}" for remark in remarks]
    rows = None
    if split or documents is not None:
        only = half(run, first=False) if split else None
        rows = selected_rows(run, plan, documents or ALL, only=only)
    usual: int = plan.config["docs_per_shard"]
    every = docs_per_shard or min(usual, max(FEWEST_DOCUMENTS, PASSES_PER_SHARD // len(found)))
    recorded = [name for name in ("outputs",) if name in plan.config["record"]]
    return Intervention(
        data=section(DataConfig, plan.config, docs_per_shard=every),
        model=section(ModelConfig, plan.config),
        capture=section(
            CaptureConfig, plan.config, record=(*recorded, "effects"), store=tuple(store),
            arms=tuple(map(tell_arm, found)),
        ),
        part_of=PartOf(
            plan=plan, rows=rows,
            told={"documents": documents, "controls": controls, "controls_seed": seed, "split": split},
        ),
        said=said,
    )  # fmt: skip


def _require_given_texts(plan: Plan, root: str | os.PathLike[str]) -> None:
    if plan.config.get("generate"):
        raise ValueError(
            f"{root} has texts that its model wrote (--generate), and effects are measured on texts that it reads: "
            "collect the finished texts as a run of their own, and intervene there"
        )


def _check(run: Run, arms: Sequence[Arm]) -> None:
    """Checks the edits of recorded routers; those of other layers are checked where the model is."""
    sizes = {(one["stack"], one["layer"]): (one["n_experts"], one["top_k"]) for one in run.info["layers"]}
    for arm in arms:
        for at in {(edit.stack, edit.layer) for edit in arm.edits} & sizes.keys():
            own = [edit for edit in arm.edits if (edit.stack, edit.layer) == at]
            check(own, f"arm {arm.name!r}: {at[0]} layer {at[1]}", *sizes[at])
