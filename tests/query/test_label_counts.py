"""Counts on demand say what the SQL of the views says, whichever routers and columns queries ask for first."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings

from collector.query import label_counts
from collector.query.catalog import find_query, list_queries
from collector.query.rollup import making
from collector.query.warehouse import open_run
from collector.store.run_directory import RunDirectory
from collector.store.tables import Layer
from tests.helpers.query_runs import assert_same_rows, by_sql, few_examples, opened, random_runs
from tests.helpers.synthetic import Shard, random_shard, write_run

LAYERS = [
    Layer(layer=0, n_experts=4, top_k=1),
    Layer(layer=1, n_experts=300, top_k=3, has_capacity=True),
    Layer(stack="encoder", layer=1, n_experts=4, top_k=2),
]
OF_COUNTS = [query.name for query in list_queries() if "assignments" in query.reads]


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(3)
    shards = [random_shard(rng, LAYERS, [("en", 12), ("o'brien", 9), ("en", 1)], special=0.3) for _ in range(2)]
    return write_run(tmp_path / "run", LAYERS, shards)


@pytest.fixture
def passes(monkeypatch) -> list[tuple[set, bool]]:
    """The passes over the rows: which routers, and whether with weights."""
    made = []
    count = label_counts._count_pass

    def watched(cursor, layers, names, *, weights):
        made.append(({(layer.stack, layer.layer) for layer in layers}, weights))
        return count(cursor, layers, names, weights=weights)

    monkeypatch.setattr(label_counts, "_count_pass", watched)
    return made


@settings(few_examples, max_examples=5)  # each asks most queries four times
@given(random_runs())
def test_every_query_says_what_it_says_over_the_views(generated):
    with opened(*generated) as run:
        for name in OF_COUNTS:
            takes = "include_special" in {param.name for param in find_query(name).params}
            for given in ({"include_special": False}, {"include_special": True}) if takes else ({},):
                assert_same_rows(run.query(name, **given).fetchall(), by_sql(run, name, **given))


def test_the_highest_weight_counts_and_the_first_among_equals(tmp_path):
    layer = Layer(layer=0, n_experts=4, top_k=3)
    shard = Shard.of_picks(
        [layer], documents=[("en", 3)], experts={0: [[3, 1, 2], [2, 3, 0], [0, 1, 3]]},
        weights={0: [[0.2, 0.5, 0.5], [0.5, 0.2, 0.1], [0.3, 0.3, 0.3]]},
    )  # fmt: skip
    rows = open_run(write_run(tmp_path / "run", [layer], [shard])).query("top_experts").fetchall()
    assert {row[5]: row[-1] for row in rows if row[0] == "top1"} == {0: 1, 1: 1, 2: 1}


def test_a_pick_of_weight_zero_and_of_negative_weight_counts(tmp_path):
    layer = Layer(layer=0, n_experts=3, top_k=2)
    shard = Shard.of_picks([layer], documents=[("en", 1)], experts={0: [[2, 1]]}, weights={0: [[-1.0, 0.0]]})
    run = open_run(write_run(tmp_path / "run", [layer], [shard]))
    assert run.query("selection_frequency").fetchall() == by_sql(run, "selection_frequency")
    assert [row[5] for row in run.query("top_experts").fetchall() if row[0] == "top1"] == [1]


def test_many_labels_are_counted_router_by_router(tmp_path, passes, monkeypatch):
    monkeypatch.setattr(label_counts, "_NUMBERS", 1)
    rng = np.random.default_rng(4)
    layers = [LAYERS[0], dataclasses.replace(LAYERS[0], layer=255), LAYERS[2]]
    shard = random_shard(rng, layers, [(f"label {i % 50}", 2) for i in range(60)], special=0.3)
    run = open_run(write_run(tmp_path / "run", layers, [shard]))
    assert_same_rows(run.query("selection_frequency").fetchall(), by_sql(run, "selection_frequency"))
    assert [asked for asked, _ in passes] == [{("decoder", 0)}, {("decoder", 255)}, {("encoder", 1)}]


def test_only_the_routers_that_are_asked_about_are_counted_and_only_once(folder, passes):
    run = open_run(folder)
    for _ in range(2):
        run.query("domain_specialization", stack="decoder", layer=1)
    assert passes == [({("decoder", 1)}, False)]
    run.query("mutual_information")
    assert passes[1:] == [({("decoder", 0)}, False), ({("encoder", 1)}, False)]
    run.query("domain_specialization", layer=1)
    assert len(passes) == 3


def test_weights_are_read_when_a_query_needs_them(folder, passes):
    run = open_run(folder)
    run.query("domain_specialization", layer=0)
    rows = run.query("selection_frequency", layer=0).fetchall()
    run.query("domain_specialization", layer=0)
    assert passes == [({("decoder", 0)}, False), ({("decoder", 0)}, True)]
    assert_same_rows(rows, by_sql(run, "selection_frequency", layer=0))


def test_a_statement_of_the_user_sees_all_routers_whatever_was_counted(folder):
    run = open_run(folder)
    picks = "select sum(picks) from assignments"
    before = run.sql(picks).fetchall()
    run.query("domain_specialization", layer=0)
    assert run.sql(picks).fetchall() == before


def test_queries_that_read_no_counts_count_nothing(folder, passes):
    run = open_run(folder)
    run.query("router_entropy").fetchall()
    run.sql("from assignments").fetchall()
    assert passes == []


@pytest.mark.parametrize("by", ["label", "length"])
def test_a_rollup_is_read_instead(folder, passes, by):
    making.make(RunDirectory(folder))
    open_run(folder, by=by).query("domain_specialization").fetchall()
    assert passes == []


def test_threads_that_ask_at_once_get_the_same(folder, passes):
    run = open_run(folder)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: run.query("selection_frequency").fetchall(), range(8)))
    assert answers == [answers[0]] * 8
    assert len(passes) == 2


def test_a_run_without_a_token_has_no_rows(tmp_path):
    run = open_run(write_run(tmp_path / "run", LAYERS, []))
    assert [run.query(name).fetchall() for name in OF_COUNTS] == [by_sql(run, name) for name in OF_COUNTS]
