"""What quantization changes of a model's routing: the same tokens through 16 bits and through fewer.

    python -m benchmarks.fidelity                     # the demo model and a wide random one, nf4 against bfloat16
    python -m benchmarks.fidelity --against fp4 int8-linear

Two runs are collected and compared token by token and layer by layer:

- top-k Jaccard: |A and B| / |A or B| of the experts chosen, mean over tokens;
- top-1 flips: share of tokens whose highest-weight expert differs;
- both by tenths of the margin that the bfloat16 run had: for the Jaccard between the last expert chosen
  and the first left out, for the flips between the two highest weights;
- domain specialization DS(e, D) = N_eD / N_D: mean and largest change over experts and languages, and
  the share of languages whose most specialized expert stays the same.

The wide model has random weights, whose routing no training has made decided: a worst case.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
from typing import TYPE_CHECKING, Literal

from benchmarks.collect import machine, wide_model
from collector import driver
from collector.config import CaptureConfig, DataConfig, ModelConfig, resolve
from collector.warehouse import open_run

if TYPE_CHECKING:
    from collector.warehouse import Run

COMPARE = """
with pairs as (
    select a.layer, a.margin,
        [{a}] as one, [{b}] as other, [{wa}] as w_one, [{wb}] as w_other
    from a inner join b using (shard, layer, tok)
    where not a.is_special
),
compared as (
    select layer, margin,
        len(list_intersect(one, other)) / (2 * len(one) - len(list_intersect(one, other))) as jaccard,
        one[list_position(w_one, list_max(w_one))] <> other[list_position(w_other, list_max(w_other))] as flip,
        ntile(10) over (partition by layer order by margin) as tenth,
        ntile(10) over (partition by layer order by list_reverse_sort(w_one)[1] - list_reverse_sort(w_one)[2]) as lead
    from pairs
)
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Compare quantized routing with that of bfloat16."""

    models: tuple[Literal["demo", "wide"], ...] = ("demo", "wide")
    """Which models."""
    against: tuple[Literal["nf4", "fp4", "int8-linear"], ...] = ("nf4",)
    """Which quantizations."""
    demo_documents: int = 6000
    """Documents for the demo model."""
    wide_documents: int = 60
    """Documents for the wide model."""


def collect(root: str, model: ModelConfig, data: DataConfig) -> Run:
    """One run, in this process."""
    config = resolve(data=data, model=model, capture=CaptureConfig(), device="cpu")
    driver.collect_in_process(root, config)
    return open_run(root)


def compare(title: str, plain: Run, quantized: Run) -> None:
    """Prints the comparison of two runs of the same tokens."""
    con = plain.connection
    k = con.sql("select max(top_k) from layers").fetchall()[0][0]
    con.register("b", quantized.connection.sql("select * from routing").to_arrow_table())
    con.execute("create or replace temp view a as select * from routing")
    columns = {"a": "a.e", "b": "b.e", "wa": "a.w", "wb": "b.w"}
    lists = {name: ", ".join(f"{column}{i}" for i in range(k)) for name, column in columns.items()}
    compared = COMPARE.format(**lists)
    by_layer = con.sql(
        f"{compared} select layer, count(*), avg(jaccard), avg(flip::int) from compared group by layer order by layer"
    ).fetchall()
    tenths = con.sql(
        f"{compared} select tenth, jaccard, flips from "
        "(select tenth, avg(jaccard) as jaccard from compared group by tenth) inner join "
        "(select lead as tenth, avg(flip::int) as flips from compared group by lead) using (tenth) order by tenth"
    ).fetchall()
    change = specialization(plain, quantized)
    print(f"\n### {title}\n")
    print(f"| layer | tokens | top-{k} Jaccard | top-1 flips | mean change of DS | largest | same top expert |")
    print("|---|---|---|---|---|---|---|")
    for layer, tokens, jaccard, flips in by_layer:
        mean, largest, same = change[layer]
        print(f"| {layer} | {tokens:,} | {jaccard:.3f} | {flips:.3f} | {mean:.4f} | {largest:.3f} | {same:.2f} |")
    print("\n| margin, tenths from the smallest | " + " | ".join(str(tenth) for tenth, *_ in tenths) + " |")
    print("|---" * 11 + "|")
    print(f"| top-{k} Jaccard | " + " | ".join(f"{jaccard:.3f}" for _, jaccard, _ in tenths) + " |")
    print("| top-1 flips | " + " | ".join(f"{flips:.3f}" for *_, flips in tenths) + " |", flush=True)


def specialization(plain: Run, quantized: Run) -> dict[int, tuple[float, float, float]]:
    """{layer: (mean |change| of DS, largest, share of labels whose top expert stays)}."""
    con = plain.connection
    for name, run in (("ds_a", plain), ("ds_b", quantized)):
        con.register(name, run.query("domain_specialization").to_arrow_table())
    rows = con.sql(
        """
        with paired as (
            select layer, label, expert, a.value as one, b.value as other
            from ds_a as a inner join ds_b as b using (layer, label, expert)
        ),
        tops as (
            select layer, avg((arg_max_one = arg_max_other)::int) as same
            from (select layer, label, arg_max(expert, one) as arg_max_one, arg_max(expert, other) as arg_max_other
                  from paired group by layer, label)
            group by layer
        )
        select layer, avg(abs(one - other)), max(abs(one - other)), any_value(same)
        from paired inner join tops using (layer) group by layer
        """
    ).fetchall()
    return {layer: (mean, largest, same) for layer, mean, largest, same in rows}


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
