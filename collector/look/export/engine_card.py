"""Writes the card of a placement: where it comes from, for which traffic, and how balanced it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from collector.store.commits import Attempts

if TYPE_CHECKING:
    from collector.query.placement_plan import PlacementPlan
    from collector.query.warehouse import Run
    from collector.store.run_directory import RunDirectory

NAME = "README.md"
_FILES = {
    "eplb": """\
`weight.npy` holds the loads [L, E] that EPLB's `rebalance_experts` takes, `placement.json` what it returns: phy2log
[L, R], log2phy [L, E, …] padded with -1, and logcnt [L, E]. `routers` names the layer of each row.""",
    "sglang": """\
`init_expert_location.json` is for SGLang's `--init-expert-location`, with `--ep-num-redundant-experts {more}`. It has a
row for each layer of the model; those without loads hold experts in their order. `logical_count.json` has the loads
instead, for the same option: then SGLang plans by itself.""",
    "vllm-ascend": """\
`expert_map.json` is for vLLM-Ascend's `expert_map_path`. Its `layer_id` counts the layers with experts from 0.""",
}

_BALANCEDNESS = """\
The mean load of a GPU by the largest: 1 where all are loaded alike. The load of a replicated expert is divided evenly
among its replicas. Measured in every other document of each label. Before: experts in their order, slot p holding
expert p mod E. After: a placement that was computed from the documents between them. The files hold the one that was
computed in the same way from all documents."""


def text(directory: RunDirectory, run: Run, plan: PlacementPlan, engine: str) -> str:
    """Renders the card in Markdown."""
    sections = [
        f"# Placement of the experts of {run.info['config']['model']}",
        "\n".join(f"- {name}: {value}" for name, value in _facts(directory, run, plan).items()),
        "## Files",
        _FILES[engine].format(more=plan.placement.expert_LP.shape[1] - plan.load_LE.shape[1]),
        "## Balancedness",
        _BALANCEDNESS,
        table(plan),
    ]
    return "\n\n".join(sections) + "\n"


def table(plan: PlacementPlan) -> str:
    """Returns the balancedness by layer, and its mean, as a table in Markdown."""
    rows = [(str(one.layer), *each) for one, *each in zip(plan.layers, plan.before_L, plan.after_L, strict=True)]
    rows.append(("mean", plan.before_L.mean(), plan.after_L.mean()))
    body = [f"| {layer:>5} | {before:>6.3f} | {after:>6.3f} |" for layer, before, after in rows]
    return "\n".join(["| layer | before |  after |", "|------:|-------:|-------:|", *body])


def _facts(directory: RunDirectory, run: Run, plan: PlacementPlan) -> dict[str, str]:
    cluster, attempts = plan.cluster, Attempts()
    for commit in directory.commits():
        attempts.add(commit)
    mix = "all documents as they are"
    if plan.mix is not None:
        mix = ", ".join(f"{label} {share:.4g}" for label, share in plan.mix.items())
    how = "groups divided among nodes first" if cluster.is_hierarchical and cluster.nodes > 1 else "all GPUs alike"
    return {
        "run": f"{directory.root}{'' if run.complete else ', incomplete'}",
        "plan hash": run.info["plan_hash"],
        "commits": attempts.digest(),
        "routers": f"{len(plan.layers)} of the {plan.layers[0].stack}, {plan.layers[0].n_experts} experts each",
        "cluster": f"GPUs {cluster.gpus}, nodes {cluster.nodes}, groups of experts {cluster.groups}; {how}",
        "experts on GPUs": f"{plan.placement.expert_LP.shape[1]} per layer, replicas included",
        "traffic": mix,
        "loads": f"picks per million tokens, special tokens {'included' if plan.include_special else 'left out'}",
    }
