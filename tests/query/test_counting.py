"""What numpy computes in the place of a macro is what the macro's SQL says."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from collector.data.sources import LABEL_SEPARATOR
from collector.query.catalog import find_query
from collector.query.comparison import open_runs
from collector.query.counting import macros, token_counts
from collector.query.warehouse import Run, open_run
from collector.store import tables
from collector.store.tables import Layer
from tests.helpers.query_runs import by_sql
from tests.helpers.synthetic import Shard, random_shard, write_run

LAYERS = [
    Layer(layer=0, n_experts=4, top_k=1),
    Layer(layer=1, n_experts=300, top_k=3, has_capacity=True),
    Layer(stack="encoder", layer=1, n_experts=4, top_k=2),
]
SEVERAL = LABEL_SEPARATOR.join(("en", "ko"))
DOCUMENTS = [("en", 12), ("o'brien", 9), (SEVERAL, 7), ("en", 1)]
CALLS = {
    "token_counts": "from token_counts('token_decisions', $stack, $layer, $labels, $include_special) -- top1",
    "pair_counts": "from pair_counts('decisions', $stack, $layer, $labels, $include_special, $mode = 'released')",
    "neighbour_counts": "from neighbour_counts('token_decisions', $stack, $layer, $labels, $include_special)",
}
CHOICES = [
    ("label", {}),
    ("label", {"stack": "decoder", "layer": 1, "include_special": True}),
    ("label", {"labels": ["en", SEVERAL]}),
    ("length", {"stack": "encoder"}),
    ("position", {"include_special": True}),
]


def shards() -> list[Shard]:
    rng = np.random.default_rng(3)
    return [random_shard(rng, LAYERS, DOCUMENTS, special=0.2, vocabulary=7) for _ in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("counting") / "run", LAYERS, shards())


def compare(run: Run, name: str, **choice: object) -> int:
    """Compares the rows of a macro with those that stand in for it; returns how many there are."""
    found = 0
    for mode in ("paper", "released") if name == "pair_counts" else (None,):
        values = {"stack": None, "layer": None, "labels": None, "include_special": False, "mode": mode} | choice
        params = {key: value for key, value in values.items() if f"${key}" in CALLS[name]}
        query = dataclasses.replace(find_query("coactivation"), sql=CALLS[name])
        cursor = run.cursor()
        expected = cursor.sql(query.sql, params=params).order("all")
        rows, types = expected.fetchall(), expected.types
        macros.provide(cursor, query, values, tables.recorded_layers(run.info), has_weights=True)
        computed = cursor.sql(query.sql, params=params).order("all")
        assert computed.fetchall() == rows
        assert (computed.types, computed.columns) == (types, expected.columns)
        found += len(rows)
    return found


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("by", "choice"), CHOICES)
def test_the_rows_of_a_macro_are_computed(folder, by, choice, name, monkeypatch):
    monkeypatch.setattr(token_counts, "_CELLS", 9)  # a few ids at a time
    assert compare(open_run(folder, by=by), name, **choice)


def test_a_run_without_a_token_has_no_rows(tmp_path):
    run = open_run(write_run(tmp_path / "run", LAYERS, []))
    assert not any(compare(run, name) for name in CALLS)


@pytest.mark.parametrize(("ids", "rows"), [([None] * 4, 0), ([2**32 - 2, 0, None, 2**32 - 2], 2)])
def test_ids_that_were_dropped_and_ids_without_order(tmp_path, ids, rows):
    shard = Shard.of_picks([LAYERS[0]], documents=[("en", 4)], experts={0: [[3], [1], [3], [0]]})
    shard = dataclasses.replace(shard, token_ids=np.array(ids, object))
    assert compare(open_run(write_run(tmp_path / "run", LAYERS[:1], [shard])), "token_counts") == rows


def test_equal_weights_keep_the_models_order(tmp_path):
    layer = Layer(layer=0, n_experts=4, top_k=3)
    shard = Shard.of_picks(
        [layer], documents=[("en", 2)], experts={0: [[3, 1, 2], [2, 3, 0]]},
        weights={0: [[0.2, 0.5, 0.5], [0.3, 0.3, 0.3]]},
    )  # fmt: skip
    run = open_run(write_run(tmp_path / "run", [layer], [shard]))
    assert compare(run, "pair_counts")
    together = {row[3:5] for row in run.query("coactivation", mode="released").fetchall()}
    assert together == {(1, 2), (2, 1), (2, 3), (3, 2), (0, 3), (3, 0)}


def test_threads_and_runs_side_by_side_do_not_share_what_was_computed(folder, tmp_path):
    other = write_run(tmp_path / "other", LAYERS, [dataclasses.replace(shard, experts={
        one: (e_tk + 1) % (300 if e_tk.shape[1] == 3 else 4) for one, e_tk in shard.experts.items()
    }) for shard in shards()])  # fmt: skip
    pair = open_runs(folder, other)
    rows = pair.query("coactivation", stack="encoder").to_arrow_table()
    assert rows["n"].to_pylist() == [row[7] for row in by_sql(pair.run, "coactivation", stack="encoder")]
    assert rows["n_beside"].to_pylist() != rows["n"].to_pylist()
    run = open_run(folder)
    asked = [{"stack": "decoder", "layer": 1}, {"stack": "encoder"}] * 2
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda choice: run.query("repetition", **choice).fetchall(), asked))
    assert answers == [by_sql(run, "repetition", **choice) for choice in asked]
