"""Measures how quantization changes a model's routing: the same tokens in 16 bits and quantized.

    python -m benchmarks.fidelity                     # the demo model and a wide random one, nf4 against bfloat16
    python -m benchmarks.fidelity --against fp4 int8-linear

Two runs are collected and compared with the query `quantization_fidelity`, all languages together. It groups tokens
into tenths of the bfloat16 run: the Jaccard index by the margin (between the last chosen expert and the first left
out), the top-1 flips by the lead (between the two highest weights).

The wide model has random weights, so its routing is undecided: a worst case.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
from typing import TYPE_CHECKING, Literal

from benchmarks.collect import machine, wide_model
from collector.config import CaptureConfig, DataConfig, ModelConfig, resolve
from collector.fleet import driver
from collector.query.comparison import open_runs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from collector.query.comparison import Comparison


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Compare quantized routing with that of bfloat16."""

    models: tuple[Literal["demo", "wide"], ...] = ("demo", "wide")
    """Models to measure."""
    against: tuple[Literal["nf4", "fp4", "int8-linear"], ...] = ("nf4",)
    """Quantizations to compare with bfloat16."""
    demo_documents: int = 6000
    """Documents for the demo model."""
    wide_documents: int = 60
    """Documents for the wide model."""


def collect(root: str, model: ModelConfig, data: DataConfig) -> str:
    """Collects one run in this process."""
    config = resolve(data=data, model=model, capture=CaptureConfig(), device="cpu")
    driver.collect_in_process(root, config)
    return root


def compare(title: str, plain: str, quantized: str) -> None:
    """Prints the comparison of two runs of the same tokens."""
    pair = open_runs(plain, quantized)
    k = max(one["top_k"] for one in pair.run.info["layers"])
    by_margin, by_lead = (values(pair, by) for by in ("margin", "lead"))
    print(f"\n### {title}\n")
    print(f"| layer | tokens | top-{k} Jaccard | top-1 flips | mean change of DS | largest | same top expert |")
    print("|---|---|---|---|---|---|---|")
    metrics = (
        "topk_jaccard",
        "top1_flips",
        "specialization_change",
        "largest_specialization_change",
        "same_top_expert",
    )
    layers = [one["layer"] for one in pair.run.info["layers"]]
    for layer in layers:
        jaccard, flips, mean, largest, same = (by_margin[metric, layer, 0][0] for metric in metrics)
        tokens = by_margin["topk_jaccard", layer, 0][1]
        print(f"| {layer} | {tokens:,} | {jaccard:.3f} | {flips:.3f} | {mean:.4f} | {largest:.3f} | {same:.2f} |")
    print("\n| margin, tenths from the smallest | " + " | ".join(map(str, range(1, 11))) + " |")
    print("|---" * 11 + "|")
    for name, found, metric in (
        (f"top-{k} Jaccard", by_margin, "topk_jaccard"),
        ("top-1 flips", by_lead, "top1_flips"),
    ):
        tenths = (mean_of_layers([found.get((metric, layer, tenth)) for layer in layers]) for tenth in range(1, 11))
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in tenths) + " |", flush=True)


def values(pair: Comparison, by: str) -> dict[tuple[str, int, int], tuple[float, int]]:
    """Returns (value, tokens) by (metric, layer, decile), all languages together."""
    rows = pair.query("quantization_fidelity", pooled=True, by=by).project("metric, layer, decile, value, n").fetchall()
    return {(metric, layer, decile): (value, n) for metric, layer, decile, value, n in rows}


def mean_of_layers(cells: Sequence[tuple[float, int] | None]) -> float:
    """Averages over the tokens of all layers; ties in the margin can leave a decile of a layer empty."""
    present = [cell for cell in cells if cell is not None]
    return sum(value * n for value, n in present) / max(1, sum(n for _, n in present))


def main(bench: Bench) -> None:
    """Collects the runs and prints the tables."""
    print(f"python -m benchmarks.fidelity {' '.join(sys.argv[1:])}\n{machine()}", flush=True)
    for name in bench.models:
        with contextlib.ExitStack() as stack:
            if name == "wide":
                lm, model, folder = wide_model("bfloat16")
                del lm
                stack.enter_context(folder)
                title = "OLMoE at full width, 4 layers, random weights"
            else:
                model, title = ModelConfig(dtype="bfloat16"), "Demo model (trained)"
            count = bench.wide_documents if name == "wide" else bench.demo_documents
            data = DataConfig(per_label=max(1, count // 60))
            roots = stack.enter_context(tempfile.TemporaryDirectory())
            plain = collect(f"{roots}/plain", model, data)
            for how in bench.against:
                quantized = collect(f"{roots}/{how}", dataclasses.replace(model, quantization=how), data)
                compare(f"{title}: {how} against bfloat16", plain, quantized)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Bench))
