"""Writes what a run says of itself: run.json at its beginning, and the marks of a complete run at its end."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from collector.query.warehouse import views_sql
from collector.store.run_directory import RUN, VIEWS

if TYPE_CHECKING:
    from collector.data.plan import Plan
    from collector.store.run_directory import RunDirectory

FORMAT = 2
"""Version of the run directory's layout."""


def record_card(run: RunDirectory, plan: Plan, card: dict[str, Any], *, hardware: dict[str, Any] | None = None) -> None:
    """Writes run.json from the first card; every later card must agree with it.

    Args:
        run: the run directory.
        plan: of the run.
        card: a replica's description of its model, or an import's of its dump.
        hardware: the resources that the first launch reserves for a replica.

    Raises:
        ValueError: a replica holds another model than the run was begun with; names what differs.
    """
    described = {
        "format": FORMAT,
        "config": plan.config,
        "plan_hash": plan.hash,
        "plan": {"shards": len(plan.shards), "documents": plan.documents},
        **card,
        **({"hardware": hardware} if hardware else {}),
    }
    if run.store.put_new(RUN, json.dumps(described, indent=1).encode() + b"\n"):
        return
    recorded = run.read_json(RUN)
    # What the run's first version did not say of its model cannot differ.
    different = [key for key, said in card.items() if key in recorded and key != "versions" and recorded[key] != said]
    if different:
        details = "; ".join(f"{key}: {recorded.get(key)} -> {card[key]}" for key in different)
        raise ValueError(f"{run.root} was begun with another model than this replica loaded ({details})")


def finish(run: RunDirectory, plan: Plan) -> None:
    """Marks the run complete if every shard of the plan is committed."""
    if run.committed_shards() == {shard.shard for shard in plan.shards}:
        run.store.put(VIEWS, views_sql(run).encode())
        run.finish(plan.hash, len(plan.shards))
