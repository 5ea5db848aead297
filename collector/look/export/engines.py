"""Exports a placement of a run's experts for a serving engine: EPLB, SGLang or vLLM-Ascend.

The placement is EPLB's for the loads of the run, or of a mix of its labels. Beside the engine's files stands a card
with the run, the traffic, and how balanced the placement is on documents that it was not computed from. The folder
appears as a whole or not at all.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from collector.look.export import engine_card
from collector.look.export.folders import built_beside, new_folder, size_of
from collector.query.placement_plan import plan_placement
from collector.query.placements.eplb import in_order
from collector.query.warehouse import open_run

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from collector.query.placement_plan import PlacementPlan
    from collector.query.placements.eplb import Cluster
    from collector.query.warehouse import Run
    from collector.store.run_directory import RunDirectory

Engine = Literal["eplb", "sglang", "vllm-ascend"]
ENGINES: tuple[str, ...] = get_args(Engine)


def export_placement(
    directory: RunDirectory,
    out: str,
    to: Engine,
    cluster: Cluster,
    *,
    stack: str | None = None,
    mix: Mapping[str, float] | None = None,
    include_special: bool = False,
    partial: bool = False,
) -> tuple[PlacementPlan, int]:
    """Exports a placement into a new folder.

    Args:
        directory: the run, local or on an object store.
        out: the folder, which must be new or empty.
        to: the engine.
        cluster: its GPUs.
        stack: which routers, where a run has those of several stacks.
        mix: shares of labels in the traffic, which sum to 1 (default: all documents as they are).
        include_special: also count the special tokens that the tokenizer added.
        partial: also accept an incomplete run.

    Returns:
        What was planned, and the bytes of all files.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: `out` is not empty or not local, the run is incomplete, the engine's format needs what the run does
            not know, or the experts cannot be placed like this (see `plan_placement`).
        StoreError: the object store refuses or does not answer.
    """
    target = new_folder(out)
    run = open_run(directory.root)
    if not run.complete and not partial:
        raise ValueError(f"{directory.root} is incomplete; --partial plans with what is committed so far")
    plan = plan_placement(run, cluster, stack=stack, mix=mix, include_special=include_special)
    with built_beside(target) as folder:
        if to == "eplb":
            _write_eplb(plan, folder)
        elif to == "sglang":
            _write_sglang(plan, folder, _hidden_layers(run, plan))
        else:
            _write_vllm_ascend(plan, folder, run)
        (folder / engine_card.NAME).write_text(engine_card.text(directory, run, plan, to), encoding="utf-8")
        size = size_of(folder)
    return plan, size


def _write_eplb(plan: PlacementPlan, folder: Path) -> None:
    """Writes what `rebalance_experts` takes and returns, and which router each row is."""
    np.save(folder / "weight.npy", plan.load_LE)
    placement, cluster = plan.placement, plan.cluster
    fields = {
        "num_replicas": placement.expert_LP.shape[1], "num_groups": cluster.groups, "num_nodes": cluster.nodes,
        "num_gpus": cluster.gpus, "routers": [{"stack": one.stack, "layer": one.layer} for one in plan.layers],
        "phy2log": placement.expert_LP.tolist(), "log2phy": placement.slots_LEX.tolist(),
        "logcnt": placement.replicas_LE.tolist(),
    }  # fmt: skip
    _write_json(folder / "placement.json", fields)


def _write_sglang(plan: PlacementPlan, folder: Path, hidden_layers: int) -> None:
    """Writes the map, and the loads for an engine that is to plan by itself; one key each, further ones make it fail.

    Rows are the model's layers: those without loads get experts in their order, and no load.
    """
    experts, slots = plan.load_LE.shape[1], plan.placement.expert_LP.shape[1]
    places = [one.layer for one in plan.layers]
    expert_LP = in_order(hidden_layers, experts, slots).expert_LP
    expert_LP[places] = plan.placement.expert_LP
    load_LE = np.zeros((hidden_layers, experts), np.int64)
    load_LE[places] = plan.load_LE
    _write_json(folder / "init_expert_location.json", {"physical_to_logical_map": expert_LP.tolist()})
    _write_json(folder / "logical_count.json", {"logical_count": load_LE.tolist()})


def _write_vllm_ascend(plan: PlacementPlan, folder: Path, run: Run) -> None:
    """Writes the experts of each device, layer by layer; `layer_id` counts the layers that have experts from 0."""
    _require_all_routers(run, plan)
    layers = [
        {
            "layer_id": number,
            "device_count": plan.cluster.gpus,
            "device_list": [
                {"device_id": device, "device_expert": experts}
                for device, experts in enumerate(expert_P.reshape(plan.cluster.gpus, -1).tolist())
            ],
        }
        for number, expert_P in enumerate(plan.placement.expert_LP)
    ]
    _write_json(folder / "expert_map.json", {"moe_layer_count": len(layers), "layer_list": layers})


def _hidden_layers(run: Run, plan: PlacementPlan) -> int:
    """The model's number of layers in the stack."""
    if depth := run.info["config"].get("geometry", {}).get("depth"):
        return int(depth)  # of an engine's arrays, which have all layers
    of_stack = f"where stack = '{plan.layers[0].token_stack}'"
    layers = run.sql(f"select max(layer) from components {of_stack}").fetchall() if run.has("components") else [(None,)]
    if layers[0][0] is None:
        raise ValueError("SGLang wants a row for each layer of the model, and this run does not know how many it has")
    return max(layers[0][0], *(one.layer for one in plan.layers)) + 1


def _require_all_routers(run: Run, plan: PlacementPlan) -> None:
    """Layers are counted, so none may be missing."""
    if run.info["config"].get("layers") is None:
        return
    routers = f"select layer from components where component = 'router' and stack = '{plan.layers[0].token_stack}'"
    known = {layer for (layer,) in run.sql(routers).fetchall()} if run.has("components") else set()
    if not known or known - {one.layer for one in plan.layers}:
        raise ValueError(
            "vLLM-Ascend counts the layers with experts, and this run recorded some of them: collect without --layers"
        )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")
