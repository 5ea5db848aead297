"""Summarizes a run in a paragraph and a small table, for the appendix of a paper.

Everything comes from run.json, the plan and the commit records, except the labels, which come from
the documents tables.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from collector.look import terminal
from collector.models.edits import parse_arm
from collector.store import throughput
from collector.store.run_directory import RUN, SUCCESS
from collector.store.totals import Totals

if TYPE_CHECKING:
    from collections.abc import Mapping

    from collector.data.plan import Plan
    from collector.store.run_directory import RunDirectory

FEW_LABELS = 8
"""Up to this many labels are listed with their documents; otherwise only their number is given."""


def summarize(run: RunDirectory) -> tuple[str, bool]:
    """Summarizes a run for a paper.

    Returns:
        Markdown, and whether the run is complete.

    Raises:
        FileNotFoundError: there is no run, or no replica of it has loaded the model yet.
    """
    card, plan, totals = read(run)
    complete = run.read_or_none(SUCCESS) is not None
    labels = _labels(run)
    rows = facts(card, plan, totals, labels)
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join([_paragraph(card, plan, totals, labels, complete=complete), "", *table, ""]), complete


def read(run: RunDirectory) -> tuple[dict[str, Any], Plan, Totals]:
    """Returns the content of run.json, the plan, and the sums of the commit records.

    Raises:
        FileNotFoundError: there is no run, or no replica of it has loaded the model yet.
    """
    plan, totals = terminal.read_plan(run), Totals.of(run)
    stored = run.read_or_none(RUN)
    if stored is None:
        raise FileNotFoundError(f"{run.root} has no {RUN} yet: no replica has loaded the model")
    return json.loads(stored), plan, totals


def _paragraph(
    card: Mapping[str, Any], plan: Plan, totals: Totals, labels: Mapping[str, int], *, complete: bool
) -> str:
    model = card["model"]
    in_labels = f" in {len(labels)} languages or other labels" if labels else ""
    if imported := card.get("imported"):
        return (
            f"We imported the routing decisions of {model['id']} that {imported['from']} recorded, for "
            f"{totals.tokens:,} tokens of {totals.documents:,} documents{in_labels}: "
            f"{terminal.routers(card['layers'])}, {totals.rows:,} rows in all. "
            f"The source has no {', '.join(imported['lacks'])}. "
            f"{totals.skipped.total():,} rows were skipped{_reasons(totals)}."
        )
    cut = plan.config["max_length"]
    sentences = [
        f"We recorded the routing decisions of {model['id']} ({model['weights']} weights, {_held(card)}) for "
        f"{totals.tokens:,} tokens of {totals.documents:,} documents{in_labels}: {terminal.routers(card['layers'])}, "
        f"{totals.rows:,} rows in all.",
        f"Documents longer than {cut} tokens were cut there ({totals.truncated:,} of them); "
        f"{totals.skipped.total():,} rows were skipped{_reasons(totals)}.",
        f"The run took {totals.replica_hours:.2f} replica-hours on {_hardware(card, plan, totals)}.",
    ]
    if not complete:
        done = f"{len(totals.committed):,} of {len(plan.shards):,}"
        sentences.append(f"The run is incomplete: {done} shards are committed.")
    return " ".join(sentences)


def facts(card: Mapping[str, Any], plan: Plan, totals: Totals, labels: Mapping[str, int]) -> list[tuple[str, str]]:
    """Returns the facts about a run as names and formatted values.

    Args:
        card: content of run.json.
        plan: of the run.
        totals: of its commit records.
        labels: documents by label.
    """
    versions = card["versions"]
    rows = [
        *(_imported(card) if "imported" in card else _model(card)),
        ("routers", terminal.routers(card["layers"])),
        ("documents", f"{totals.documents:,}"),
        ("tokens", f"{totals.tokens:,}"),
        ("labels", _counts(labels)),
        ("interventions", _interventions(plan.config)),
        ("generation", _generation(plan.config)),
        ("maximum length", "" if "imported" in card else _longest(plan, totals)),
        ("skipped rows", f"{totals.skipped.total():,}{_reasons(totals)}"),
        *(() if "imported" in card else _course(card, plan, totals)),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("plan", f"{plan.hash} ({len(plan.shards):,} shards)"),
    ]
    return [(name, value) for name, value in rows if value]


def _model(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    model = card["model"]
    return [
        ("model", model["id"]),
        ("revision", model["revision"] or "–"),
        ("weights", f"{model['weights']}, fingerprint {model['fingerprint']}"),
        ("quantization", _held(card)),
    ]


def _imported(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    imported = card["imported"]
    return [
        ("model", card["model"]["id"]),
        ("imported from", imported["from"]),
        ("without", ", ".join(imported["lacks"])),
    ]


def _longest(plan: Plan, totals: Totals) -> str:
    return f"{plan.config['max_length']} tokens, {totals.truncated:,} documents truncated"


def _course(card: Mapping[str, Any], plan: Plan, totals: Totals) -> list[tuple[str, str]]:
    return [
        ("replica-hours", f"{totals.replica_hours:.2f}, padding efficiency {totals.padding_efficiency:.3f}"),
        ("compute", throughput.described(card, totals)),
        ("hardware", _hardware(card, plan, totals)),
    ]


def _interventions(config: Mapping[str, Any]) -> str:
    """How many arms there are, with which controls, over which documents; empty for a run without edits."""
    arms = [parse_arm(text) for text in config.get("arms") or ()]
    own = sum(not arm.control for arm in arms)
    said = f"{own} arm{'s' if own != 1 else ''} of edits"
    if len(arms) > own:
        said += f" with {len(arms) - own} controls (seed {config.get('controls_seed', 'unknown')})"
    if config.get("documents"):
        said += f", over the documents of: {config['documents']}"
    if config.get("split"):
        said += ", chosen in one half of the documents and measured in the other"
    return said if arms else ""


def _generation(config: Mapping[str, Any]) -> str:
    """How the model wrote on from the documents; empty for a run in which it did not."""
    if not config.get("generate"):
        return ""
    said = f"up to {config['generate']} tokens from each document"
    if config["stop_at"]:
        said += f", or to a token with {' or '.join(map(repr, config['stop_at']))}"
    if not config["temperature"]:
        return f"{said}, the most probable ones"
    drawn = f"{said}, drawn at temperature {config['temperature']:g}"
    return drawn + (f" with top-p {config['top_p']:g}" if config["top_p"] < 1 else "") + f" (seed {config['seed']})"


def _held(card: Mapping[str, Any]) -> str:
    return card["memory"]["summary"]


def _reasons(totals: Totals) -> str:
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(totals.skipped.items()))
    return f" ({reasons})" if reasons else ""


def _hardware(card: Mapping[str, Any], plan: Plan, totals: Totals) -> str:
    hardware = card.get("hardware") or {}
    nodes = f"{len(totals.nodes)} node{'s' if len(totals.nodes) != 1 else ''}"
    if plan.config["device"] == "cpu":
        return f"the CPUs of {nodes}"
    kinds = "/".join(hardware.get("accelerators", ())) or "CUDA"
    each = hardware.get("gpus_per_replica")
    return f"{kinds} GPUs of {nodes}" + (f", {each:g} per replica" if each else "")


def _counts(labels: Mapping[str, int]) -> str:
    if len(labels) > FEW_LABELS:
        return f"{len(labels)}"
    return ", ".join(f"{label} {count:,}" for label, count in labels.items())


def _labels(run: RunDirectory) -> dict[str, int]:
    """Returns the number of documents by label."""
    from collector.query.warehouse import open_run

    found = open_run(run.root).sql("select coalesce(label, '–'), documents from labels order by 1")
    return dict(found.fetchall())
