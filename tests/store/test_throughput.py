"""Operations per token of a run's passes, by hand and beside the query `compute`."""

from __future__ import annotations

from collections import Counter

import pytest

from collector.query.warehouse import open_run
from collector.store.run_directory import RUN, RunDirectory
from collector.store.throughput import described, flops_per_token
from collector.store.totals import Totals


def component(name: str, layer: int | None, flops: int, context: int = 0, window: int | None = None) -> dict:
    return {"stack": "decoder", "layer": layer, "component": name, "flops": flops, "context_flops": context,
            "window": window}  # fmt: skip


LAYERS = [{"stack": "decoder", "layer": layer, "top_k": 2} for layer in (0, 2)]
COMPONENTS = [
    component("embedding", None, 0), component("dense", None, 1_000_000),
    component("attention", 0, 10, context=2, window=3), component("router", 0, 20), component("experts", 0, 300),
    component("attention", 1, 10, context=2), component("dense", 1, 4000),
    component("attention", 2, 10, context=2), component("router", 2, 20), component("experts", 2, 50_000),
    component("shared", 2, 600_000), component("dense", 3, 7_000_000),
]  # fmt: skip
BEFORE = 10 + 2 * 3 + 20 + 2 * 300 + 10 + 2 * 5 + 4000
"""Of layers 0 and 1 for texts of 9 tokens, of which each sees five on average; the window lets it see three."""
LAST = 10 + 2 * 5 + 20


def card(record: tuple[str, ...] = (), **other: object) -> dict:
    return {"compute": COMPONENTS, "layers": LAYERS, "config": {"record": record}} | other


def totals(seconds: float = 2.0) -> Totals:
    return Totals(documents=10, tokens=90, seconds=Counter(forward=seconds, idle=5))


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ((), BEFORE + LAST),
        (("similarity",), BEFORE + LAST),
        (("outputs",), BEFORE + LAST + 2 * 50_000 + 600_000),
        (("loss",), BEFORE + LAST + 2 * 50_000 + 600_000 + 7_000_000 + 1_000_000),
    ],
)
def test_the_pass_goes_as_far_as_the_recorders_need(record, expected) -> None:
    assert flops_per_token(card(record), totals()) == expected


def test_the_share_of_the_peak_is_said_where_it_is_known() -> None:
    rate = 90 * (BEFORE + LAST) / 2
    assert described(card(), totals()) == f"4.7 kFLOP per token, {rate / 1e3:.3g} kFLOP/s in forward passes"
    h200 = {"accelerators": ["H200"], "gpus_per_replica": 0.5}
    fast = totals(90 * (BEFORE + LAST) / 989e12)
    assert described(card(hardware=h200), fast).endswith(
        "989 TFLOP/s in forward passes, 200.0 % of the peak of 0.5 H200"
    )
    for unknown in ({"accelerators": ["TPU"], "gpus_per_replica": 1}, {"accelerators": ["A100", "H100"]}):
        assert "peak" not in described(card(hardware=unknown), totals())


def test_arms_share_layers_so_no_rate_is_said() -> None:
    told = described(card(("effects",)) | {"config": {"record": ("effects",), "arms": ["a: …", "b: …"]}}, totals())
    assert told.endswith("FLOP per token, without edits")


def test_what_cannot_be_counted_is_not_said() -> None:
    assert described(card() | {"compute": None}, totals()) == ""
    assert described(card(), totals(seconds=0)) == ""
    both = [*LAYERS, {"stack": "encoder", "layer": 1, "top_k": 1}]
    assert described(card() | {"layers": both}, totals()) == ""
    assert (
        described(card() | {"compute": [*COMPONENTS, component("dense", 0, 1) | {"stack": "encoder"}]}, totals()) == ""
    )


def test_the_demo_costs_what_the_query_says(demo_runs) -> None:
    """The query knows every text's length, and this only their mean; the pass runs to its end."""
    run = RunDirectory(demo_runs["pretrained"])
    each = flops_per_token(run.read_json(RUN), Totals.of(run))
    query = open_run(run.root).query("compute", include_special=True)
    rows = query.filter("metric = 'flops_per_token' and component = 'total'").project("baseline").fetchall()
    assert each == pytest.approx(rows[0][0], rel=0.05)
