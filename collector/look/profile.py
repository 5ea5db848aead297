"""Puts together what a run knows of one expert, as nested JSON: `collector profile`.

Every number is the answer of a query, an interval or the specialization test; what the run did not record is null.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from collector.query import inference
from collector.query.document_counts import document_counts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from collector.query.warehouse import Run

_ASPECTS = {"token": "tokens", "context": "contexts", "position": "positions", "expert": "companions"}
"""Aspect of `expert_profile` -> its name here; labels come with intervals instead."""


def profile(
    run: Run, *, layer: int, expert: int, stack: str | None = None, n: int = 10, level: float = 95.0,
    resamples: int = 1000, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Returns the profile of an expert.

    Args:
        run: an opened run.
        layer: the model's own number.
        expert: the expert's number.
        stack: of the router, needed where several routers have this layer.
        n: most items of each list.
        level: of the intervals of labels, in percent.
        resamples: bootstrap samples, and shuffles of the test.
        seed: of both.

    Raises:
        ValueError: the run has no such router or expert, or several routers in this layer.
    """
    router = _router(run, stack, layer, expert)
    at: dict[str, Any] = {"stack": router["stack"], "layer": layer}
    (load,) = _rows(run, "expert_load", expert, at)
    aspects: dict[str, list[dict[str, Any]]] = {name: [] for name in _ASPECTS.values()}
    for row in _rows(run, "expert_profile", expert, {**at, "expert": expert, "n": n}):
        if (name := _ASPECTS.get(row["aspect"])) is not None:
            aspects[name].append(_of(row, "item", "value", "baseline", "n", "count"))
    return {
        "model": run.info["model"]["id"], "complete": run.complete, **at, "expert": expert,
        "experts": router["n_experts"], "top_k": router["top_k"],
        "load": _of(load, "value", "baseline", "n", "is_dead"),
        "labels": _labels(run, expert, at, n=n, level=level, resamples=resamples, seed=seed),
        **aspects,
        **outputs(run, stack=router["stack"], layer=layer, expert=expert, n=n),
    }  # fmt: skip


def outputs(run: Run, *, stack: str, layer: int, expert: int, n: int) -> dict[str, Any]:
    """Returns the parts of a profile about what the expert puts out; those that the run did not record are null."""
    at = {"stack": stack, "layer": layer}
    return {
        "contribution": _contribution(run, expert, at),
        "promotes": _promotes(run, expert, at, n),
        "direct_attribution": _direct_attribution(run, expert, at),
        "nearest_by_output": _nearest_by_output(run, expert, at, n),
        "nearest_by_weight": _nearest_by_weight(run, expert, at, n),
    }


def _router(run: Run, stack: str | None, layer: int, expert: int) -> Mapping[str, Any]:
    run.check(stack=stack, layer=layer)
    found = [one for one in run.info["layers"] if one["layer"] == layer and stack in (None, one["stack"])]
    if len(found) > 1:
        raise ValueError(
            f"layer {layer} has several routers: say --stack, one of {', '.join(r['stack'] for r in found)}"
        )
    if not 0 <= expert < found[0]["n_experts"]:
        raise ValueError(f"--expert {expert}: layer {layer} has experts 0 to {found[0]['n_experts'] - 1}")
    return found[0]


def _rows(run: Run, name: str, expert: int, params: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a query that are about the expert."""
    relation = run.query(name, **params)
    rows = [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()]
    return [row for row in rows if row["expert"] == expert]


def _of(row: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: row[name] for name in names}


def _labels(
    run: Run, expert: int, at: Mapping[str, Any], *, n: int, level: float, resamples: int, seed: int
) -> list[dict[str, Any]]:
    """The labels that choose the expert most, with intervals, and whether more than the others do."""
    table = inference.intervals(run, "domain_specialization", level=level, resamples=resamples, seed=seed, **at)
    rows = sorted((row for row in table.to_pylist() if row["expert"] == expert), key=lambda row: -row["value"])[:n]
    kept = ("label", "value", "baseline", "lift", "low", "high", "n", "documents")
    try:
        tested = inference.specialization_test(document_counts(run, **at), resamples=resamples, seed=seed).to_pylist()
    except ValueError:  # a single label, or groups of tokens: there is nothing to compare
        tested = []
    found = {row["label"]: _of(row, "q", "significant") for row in tested if row["expert"] == expert}
    return [_of(row, *kept) | found.get(row["label"], {"q": None, "significant": None}) for row in rows]


def _contribution(run: Run, expert: int, at: Mapping[str, Any]) -> dict[str, Any] | None:
    if not run.has("label_outputs"):
        return None
    rows = _rows(run, "expert_contribution", expert, {**at, "pooled": True})
    return {row["metric"]: _of(row, "value", "baseline", "n") for row in rows}


def _promotes(run: Run, expert: int, at: Mapping[str, Any], n: int) -> list[dict[str, Any]] | None:
    if not run.has("sampled_picks"):
        return None
    rows = _rows(run, "output_vocabulary", expert, {**at, "expert": expert, "n": n})
    return [_of(row, "token_id", "token", "value", "baseline", "n", "count") for row in rows]


def _direct_attribution(run: Run, expert: int, at: Mapping[str, Any]) -> dict[str, Any] | None:
    if not run.has("sampled_picks"):
        return None
    rows = _rows(run, "direct_attribution", expert, {**at, "expert": expert, "pooled": True})
    return _of(rows[0], "value", "baseline", "standard_error", "n", "documents") if rows else None


def _nearest_by_output(run: Run, expert: int, at: Mapping[str, Any], n: int) -> list[dict[str, Any]] | None:
    if not run.has("expert_pairs"):
        return None
    rows = _rows(run, "expert_similarity", expert, {**at, "expert": expert})
    return [_of(row, "other_expert", "value", "standard_error", "n") for row in _highest(rows, n)]


def _nearest_by_weight(run: Run, expert: int, at: Mapping[str, Any], n: int) -> list[dict[str, Any]] | None:
    if not run.has("weights"):
        return None
    rows = _rows(run, "weight_similarity", expert, {**at, "expert": expert})
    rows = rows or _rows(run, "weight_similarity", expert, {**at, "expert": expert, "measure": "cosine"})
    return [_of(row, "other_expert", "value", "mean") for row in _highest(rows, n)]


def _highest(rows: Sequence[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    return sorted((row for row in rows if row["value"] is not None), key=lambda row: -row["value"])[:n]
