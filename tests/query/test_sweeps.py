"""Questions to a sweep: the answers of its runs, one after the other, with the checkpoint in front."""

from __future__ import annotations

import csv
import io
import json
import shutil

import pyarrow as pa
import pytest
from pandas.testing import assert_frame_equal

from collector import inference, open_run, open_runs, open_sweep
from collector.store.run_directory import SUCCESS
from tests.helpers.command_line import collector

NAMES = ("step2-tokens1M", "step10-tokens5M", "final")


@pytest.fixture(scope="module")
def swept(tiny_sweep):
    return open_sweep(tiny_sweep)


def assert_has(table: pa.Table, checkpoint: str, rows: pa.Table) -> None:
    """Compares the rows of a checkpoint, without the columns that name it, with those of its run, up to rounding."""
    own = table.filter(pa.compute.equal(table["checkpoint"], checkpoint))
    own = own.drop_columns(["checkpoint", "step", "tokens_seen"])
    assert own.num_rows == rows.num_rows > 0
    assert_frame_equal(own.to_pandas(), rows.to_pandas(), rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("mutual_information", {}),
        ("domain_specialization", {"layer": 1, "labels": ["ko"]}),
        ("load_balance", {"pooled": True}),
    ],
)
def test_a_query_has_the_rows_of_every_run_with_its_checkpoint(swept, name, params):
    rows = swept.query(name, **params).to_arrow_table()
    assert rows.column_names[:3] == ["checkpoint", "step", "tokens_seen"]
    told = dict.fromkeys(zip(*(rows[column].to_pylist() for column in rows.column_names[:3]), strict=True))
    assert list(told) == [(NAMES[0], 2, 10**6), (NAMES[1], 10, 5 * 10**6), (NAMES[2], None, None)]
    for run in swept.runs:
        assert_has(rows, run.name, open_run(run.root).query(name, **params).to_arrow_table())


def test_a_comparison_is_with_the_last_checkpoint(swept):
    rows = swept.query("router_saturation", pooled=True).to_arrow_table()
    assert list(dict.fromkeys(rows["checkpoint"].to_pylist())) == list(NAMES[:2])
    for run in swept.runs[:2]:
        pair = open_runs(run.root, swept.last.root).query("router_saturation", pooled=True).to_arrow_table()
        assert_has(rows, run.name, pair)
        assert all(0 < value < 1 for value in pair["value"].to_pylist())


def test_intervals_statements_and_groupings_are_those_of_the_runs(swept, tiny_sweep):
    given = {"resamples": 5, "layer": 0, "labels": ["ko"]}
    rows = swept.intervals("effective_experts", **given).to_arrow_table()
    first = swept.runs[0]
    assert_has(rows, first.name, inference.intervals(open_run(first.root), "effective_experts", **given))
    assert swept.sql("select count(*) as n from documents").fetchall() == [
        (NAMES[0], 2, 10**6, 24), (NAMES[1], 10, 5 * 10**6, 24), (NAMES[2], None, None, 24),
    ]  # fmt: skip
    by_length = open_sweep(tiny_sweep, by="length").query("effective_experts", layer=0).to_arrow_table()
    alone = open_run(first.root, by="length").query("effective_experts", layer=0).to_arrow_table()
    assert_has(by_length, first.name, alone)


def test_what_runs_refuse_a_sweep_refuses(swept, tmp_path):
    with pytest.raises(ValueError, match="no document of this run has the label 'xx'"):
        swept.query("effective_experts", labels=["xx"])
    with pytest.raises(ValueError, match="no query 'mutual_informatio'; did you mean mutual_information"):
        swept.query("mutual_informatio")
    with pytest.raises(ValueError, match="give your own checkpoint and step another name"):
        swept.sql("select 1 as checkpoint, 2 as step")
    with pytest.raises(FileNotFoundError, match=r"no sweep at .*: there is no sweep.json"):
        open_sweep(tmp_path)
    for content in ("{}", '{"format":1', "[]"):
        (tmp_path / "sweep.json").write_text(content)
        with pytest.raises(ValueError, match=r"sweep.json is damaged"):
            open_sweep(tmp_path)


def test_incomplete_runs_take_no_part_and_are_named(tiny_sweep, tmp_path):
    own = shutil.copytree(tiny_sweep, tmp_path / "sweep")
    (own / NAMES[1] / SUCCESS).unlink()
    sweep = open_sweep(own)
    assert [run.name for run in sweep.incomplete] == [NAMES[1]]
    assert {name for (name,) in sweep.query("mutual_information").project("checkpoint").fetchall()} == {
        NAMES[0],
        NAMES[2],
    }
    assert sweep.remarks() == [f"without {NAMES[1]}: not complete, collector status {own} says why"]
    (own / NAMES[2] / SUCCESS).unlink()
    with pytest.raises(ValueError, match=f"compares checkpoints with the last, and only {NAMES[0]} is complete"):
        open_sweep(own).query("router_saturation")
    (own / NAMES[0] / SUCCESS).unlink()
    with pytest.raises(ValueError, match=r"no run of .* is complete yet: collector status"):
        open_sweep(own)


# ---- on the command line ----


def test_the_command_line_takes_a_sweep_where_it_takes_a_run(swept, tiny_sweep, tmp_path):
    done = collector(
        "query", str(tiny_sweep), "router_saturation", "--layer", "1", "--pooled", "true", "--format", "csv"
    )
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    values = swept.query("router_saturation", layer=1, pooled=True).project("checkpoint, value").fetchall()
    assert [(row["checkpoint"], float(row["value"])) for row in rows] == values
    done = collector("query", str(tiny_sweep), "mutual_information", "--interval=95", "--resamples=9", "--format=json")
    assert {row["checkpoint"] for row in json.loads(done.stdout)} == set(NAMES)
    assert "low" in json.loads(done.stdout)[0]
    done = collector("sql", str(tiny_sweep), "select count(*) as n from documents", "--format", "json")
    assert json.loads(done.stdout)[2] == {"checkpoint": "final", "step": None, "tokens_seen": None, "n": 24}
    done = collector("status", str(tiny_sweep))
    assert done.returncode == 0
    assert "3 of 3 checkpoints are complete" in done.stdout
    own = shutil.copytree(tiny_sweep, tmp_path / "sweep")
    (own / NAMES[1] / SUCCESS).unlink()
    assert collector("status", str(own)).returncode == 1
    assert f"without {NAMES[1]}: not complete" in collector("query", str(own), "mutual_information").stderr


@pytest.mark.parametrize("command", ["show", "verify", "views", "gc", "rollup", "weights"])
def test_what_takes_a_single_run_says_which_there_are(tiny_sweep, command):
    done = collector(command, str(tiny_sweep))
    assert done.returncode == 2
    assert "it is a sweep of 3 checkpoints, which query, sql, report and status take" in done.stderr
    assert f"name one of its runs, for example {tiny_sweep / 'final'}" in done.stderr


def test_a_sweep_has_nothing_beside_it(tiny_sweep):
    done = collector("query", str(tiny_sweep), "mutual_information", "--beside", str(tiny_sweep / "final"))
    assert done.returncode == 2
    assert "leave out --beside" in done.stderr
