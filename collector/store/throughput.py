"""Says how fast the forward passes of a run were: floating-point operations per second of the device's work.

Only what the model does for real tokens counts, padding apart, and a multiply-add counts as 2, as in the query
`compute`: the model FLOPs utilization of Chowdhery et al. 2022 (arXiv 2204.02311, appendix B), of a forward pass. What
recorders compute beside it (the head for losses, all experts for similarity) takes time and does not count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from collector.store.totals import Totals

PEAKS = {
    "V100": 125e12, "T4": 65e12, "A100": 312e12, "A100-40G": 312e12, "A100-80G": 312e12, "L4": 121e12, "L40S": 362e12,
    "H20": 148e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12,
}  # fmt: skip
"""FLOP/s of dense 16-bit matrix products by kind of GPU, as Ray names it; from NVIDIA's data sheets."""
_WHOLE = {"loss", "vocabulary", "effects"}
"""Recorders for which the pass runs to its end."""


def described(info: Mapping[str, Any], totals: Totals) -> str:
    """Says the operations per token, per second, and the share of the device's peak; empty where it is not known.

    Args:
        info: content of run.json.
        totals: of the commit records.
    """
    each, seconds = flops_per_token(info, totals), totals.seconds.get("forward", 0.0)
    if not each or not seconds:
        return ""
    if info["config"].get("arms"):
        return f"{_scaled(each)}FLOP per token, without edits"  # arms share layers, so passes do not tell the rate
    rate = each * totals.tokens / seconds
    hardware = info.get("hardware") or {}
    kinds, gpus = list(hardware.get("accelerators") or ()), hardware.get("gpus_per_replica") or 0
    share = ""
    if len(kinds) == 1 and kinds[0] in PEAKS and gpus:
        share = f", {100 * rate / PEAKS[kinds[0]] / gpus:.1f} % of the peak of {gpus:g} {kinds[0]}"
    return f"{_scaled(each)}FLOP per token, {_scaled(rate)}FLOP/s in forward passes{share}"


def flops_per_token(info: Mapping[str, Any], totals: Totals) -> float | None:
    """Operations of the recorded part of a forward pass for one token of the mean text.

    The pass ends at the last router, behind its experts if outputs are recorded, or runs to its end, see `_WHOLE`.
    Positions that attention sees are those of a text of mean length, so that texts of different length cost a bit more.

    Returns:
        None if the model's operations are not known, or encoder and decoder both ran.
    """
    components = info.get("compute")
    stacks = {layer["stack"].partition(".")[0] for layer in info["layers"]}
    if not components or len(stacks) != 1 or not totals.documents:
        return None
    (stack,) = stacks
    if stack == "decoder" and any(one["stack"] == "encoder" for one in components):
        return None
    recorded = set(info["config"].get("record") or ())
    top_k = {(layer["stack"], layer["layer"]): layer["top_k"] for layer in info["layers"]}
    last = max(layer["layer"] for layer in info["layers"])
    length = totals.tokens / totals.documents
    found = 0.0
    for one in components:
        if one["stack"].partition(".")[0] != stack or not _runs(one, last, recorded):
            continue
        picks = top_k.get((one["stack"], one["layer"]), max(top_k.values())) if one["component"] == "experts" else 1
        seen = length if stack == "encoder" else (length + 1) / 2
        found += one["flops"] * picks + one["context_flops"] * min(seen, one["window"] or seen)
    return found


def _runs(component: Mapping[str, Any], last: int, recorded: set[str]) -> bool:
    """Whether the passes of a run reach a component."""
    if recorded & _WHOLE:
        return True
    if component["layer"] is None or component["layer"] != last:
        return component["layer"] is not None and component["layer"] < last
    return component["component"] in ("attention", "router") or "outputs" in recorded


def _scaled(number: float) -> str:
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {prefix}"
    return f"{number:.3g} "
