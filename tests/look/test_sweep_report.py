"""The report of a sweep: curves over training whose numbers are the queries' answers for each checkpoint."""

from __future__ import annotations

import re
from html import unescape

import pytest
import vl_convert

from collector import __main__ as cli
from collector import open_run, open_sweep
from collector.look.report import training, write_sweep
from collector.query.sweeps import Sweep, SweptRun
from tests.helpers.command_line import collector
from tests.helpers.report_runs import payload

RESAMPLES = 5
FIGURES = [
    "specialization-over-training", "favourites-over-training", "saturation", "saturation-by-language",
    "load-over-training",
]  # fmt: skip


@pytest.fixture(scope="module")
def page(tiny_sweep, tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("report") / "report.html"
    assert write_sweep(str(tiny_sweep), out, layer=1, resamples=RESAMPLES) == [out]
    return out.read_text(encoding="utf-8")


def rows_of(page: str, figure: str, layer: int | None = None) -> list[dict]:
    table = payload(page)["tables"][f"{figure}/rows"]
    columns = table if layer is None else table[layer]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def test_the_page_has_every_figure_with_its_command(page, tiny_sweep):
    assert re.findall(r'<figure id="([^"]+)"', page) == FIGURES
    assert "3 checkpoints of one training, from step2-tokens1M to final, each over the same" in page
    commands = {unescape(command) for command in re.findall(r'data-command="([^"]+)"', page)}
    assert f"collector query {tiny_sweep} mutual_information --interval 95 --resamples {RESAMPLES}" in commands
    assert f"collector query {tiny_sweep} router_saturation --pooled true" in commands
    for command in commands:
        cli.parse(command.split()[1:])


def test_every_figure_is_drawn_with_a_mark_for_each_checkpoint(page):
    data = payload(page)
    assert [figure["name"] for figure in data["figures"]] == FIGURES
    for figure in data["figures"]:
        rows = rows_of(page, figure["name"], layer=1 if figure["by_layer"] else None)
        svg = vl_convert.vegalite_to_svg(figure["spec"] | {"datasets": {"rows": rows}})
        (title,) = {checkpoint for row in rows if (checkpoint := row["checkpoint"]) == "step10-tokens5M"}
        assert f">{title}</text>" in svg, figure["name"]


def test_every_point_is_the_query_s(page, tiny_sweep):
    for run in open_sweep(tiny_sweep).runs:
        opened = open_run(run.root)
        own = [row for row in rows_of(page, FIGURES[0]) if row["checkpoint"] == run.name]
        given = opened.query("mutual_information").filter("metric = 'normalized_mutual_information'")
        told = given.project("layer, value, bias").fetchall()
        assert [row["layer"] for row in own] == [layer for layer, *_ in told]
        assert [row["value"] for row in own] == pytest.approx([value for _, value, _ in told], rel=1e-3)
        assert [row["baseline"] for row in own] == pytest.approx([bias for *_, bias in told], rel=1e-3)
        assert all(row["low"] <= row["high"] for row in own)
        favourites = [row for row in rows_of(page, FIGURES[1], layer=1) if row["checkpoint"] == run.name]
        assert [row["label"] for row in favourites] == ["en", "ko"]
        for row in favourites:
            shares = opened.query("domain_specialization", layer=1).filter(f"label = '{row['label']}'")
            best = shares.order("value desc, expert").project("expert, lift").limit(1).fetchall()[0]
            assert (row["expert"], row["value"]) == pytest.approx(best, rel=1e-3)
    assert {row["checkpoint"] for row in rows_of(page, "saturation")} == {"step2-tokens1M", "step10-tokens5M"}


@pytest.mark.parametrize(
    ("told", "column"),
    [
        ([(0, 0), (5, 10**6), (10, 2 * 10**6)], "step"),
        ([(None, 10), (5, 20)], "tokens_seen"),
        ([(5, 10), (5, 20)], "tokens_seen"),
        ([(1, None), (None, None)], "checkpoint"),
    ],
)  # fmt: skip
def test_the_axis_is_of_steps_if_all_names_tell_different_ones(told, column):
    runs = [
        SweptRun(name=f"c{number}", step=step, tokens_seen=tokens, root="", complete=True)
        for number, (step, tokens) in enumerate(told)
    ]
    assert training.across(Sweep("", runs)).column == column


def test_steps_of_very_different_size_are_on_a_logarithmic_axis_that_has_a_zero():
    def scale(*steps: int) -> dict:
        runs = [SweptRun(name=f"c{step}", step=step, tokens_seen=None, root="", complete=True) for step in steps]
        return training.across(Sweep("", runs)).encode().to_dict()["scale"]

    assert scale(0, 10, 100, 1000) == {"type": "symlog", "constant": 10, "nice": False}
    assert scale(100, 200, 300) == {"zero": False, "nice": False}


def test_a_sweep_has_nothing_beside_it(tiny_sweep):
    done = collector("report", str(tiny_sweep), "--compare", str(tiny_sweep / "final"))
    assert done.returncode == 2
    assert "is a sweep, compared with its own last run: leave out --compare" in done.stderr
