"""The short form of the fault campaign (`make chaos` is the long one), and what makes its verdicts trustworthy.

An oracle that never objects proves nothing: here it must find each kind of damage that a collection could do.
"""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from collector.config import DataConfig, ModelConfig
from tests.chaos import toy
from tests.chaos.campaign import KILLING, SCENARIOS, cast, play
from tests.chaos.faults import PROTOCOL, Board, Fault, draw
from tests.chaos.oracle import Oracle
from tests.helpers.runs import collect_here, run_config

DOCUMENTS, PER_SHARD = 36, 3


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    return toy.write_model(tmp_path_factory.mktemp("toy"), seed=0)


@pytest.fixture(scope="module", params=[0, 1], ids=["raw weights", "normalized weights"])
def quiet(request, tmp_path_factory):
    """A run without any fault, and the oracle for it."""
    folder = tmp_path_factory.mktemp("quiet")
    model = toy.write_model(folder / "model", seed=request.param)
    source = toy.write_documents(folder / "texts.jsonl", DOCUMENTS)
    data = DataConfig(data=(str(source),), docs_per_shard=PER_SHARD)
    config = run_config(data, ModelConfig(model=str(model)), max_length=toy.MAX_LENGTH)
    collect_here(folder / "run", config, threads=1)
    return folder / "run", Oracle(model, source, PER_SHARD)


def test_a_quiet_run_holds_what_numpy_works_out(quiet):
    root, oracle = quiet
    verdict = oracle.check(root)
    assert verdict.violations == []
    assert verdict.rows == toy.LAYERS * sum(len(row.ids) for row in oracle.documents) > 1000
    assert verdict.shards == DOCUMENTS // PER_SHARD
    assert oracle.bad == [11, 28]
    assert any(row.truncated for row in oracle.documents)


def without_a_row(table):
    return table.slice(1)


def with_a_row_twice(table):
    return pa.concat_tables([table, table.slice(0, 1)])


def with_another_expert(table):
    experts = table["e0"].to_numpy().copy()
    experts[0] = (experts[0] + 1) % toy.EXPERTS
    return _with(table, "e0", experts)


def with_a_weight_slightly_off(table):
    weights = table["w1"].to_numpy().copy()
    weights[3] += np.float32(1e-4)
    return _with(table, "w1", weights)


def of_the_layer_above(table):
    return _with(table, "layer", table["layer"].to_numpy() + np.uint8(1))


def _with(table, name, values):
    at = table.schema.get_field_index(name)
    return table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))


@pytest.mark.parametrize(
    ("damage", "what"),
    [(without_a_row, "1 keys missing"), (with_a_row_twice, "1 twice"), (with_another_expert, "routing.e0: 1 of"),
     (with_a_weight_slightly_off, "routing.w1: 1 of"), (of_the_layer_above, "that should not be there")],
)  # fmt: skip
def test_the_oracle_finds(quiet, damage, what):
    root, oracle = quiet
    part = next((root / "data").glob("000004-*.routing.parquet"))
    before = part.read_bytes()
    pq.write_table(damage(pq.read_table(part)), part)
    try:
        violations = oracle.check(root).violations
    finally:
        part.write_bytes(before)
    assert len(violations) == 1
    assert what in violations[0]


def test_the_oracle_finds_a_shard_that_is_not_there(quiet, tmp_path):
    root, oracle = quiet
    record = root / "commits" / "000002.json"
    moved = record.rename(tmp_path / "moved")
    try:
        violations = oracle.check(root).violations
    finally:
        moved.rename(record)
    assert len(violations) == 1
    assert "committed shards" in violations[0]


def test_the_oracle_counts_rows_that_became_no_document(quiet):
    root, oracle = quiet
    record = root / "commits" / "000003.json"
    before = record.read_bytes()
    record.write_text(json.dumps(json.loads(before) | {"skipped": {}}))
    try:
        violations = oracle.check(root).violations
    finally:
        record.write_bytes(before)
    assert violations == ["1 rows skipped instead of 2"]


def test_a_visit_is_counted_once_whoever_makes_it(tmp_path):
    Board(tmp_path).schedule([Fault(point="commit.after", visit=each, action="refuse") for each in (3, 17, 40)])
    boards = [Board(tmp_path) for _ in range(4)]

    def refused(number):
        try:
            boards[number % 4].visit("commit.after")
        except OSError:
            return 1
        return 0

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(refused, range(64))) == 3
    assert Board(tmp_path).fired() == {("refuse", "commit.after"): 3}
    assert Board(tmp_path).unfired() == []


def test_a_fault_of_a_shard_meets_no_other(tmp_path):
    board = Board(tmp_path)
    board.schedule([Fault(point="read.before", shard=2, action="full")])
    board.visit("read.before", 1)
    with pytest.raises(OSError, match="no space left"):
        board.visit("read.before", 2)


def test_a_seed_draws_the_same_faults_again_and_every_point_in_turn():
    faults = draw(random.Random(5), 45, points=PROTOCOL, visits=10)
    assert faults == draw(random.Random(5), 45, points=PROTOCOL, visits=10)
    assert len({(fault.point, fault.visit) for fault in faults}) == 45
    assert {fault.point for fault in faults} == set(PROTOCOL)


def test_a_campaign_plays_every_scenario_and_spends_every_kill():
    plays = cast(runs=24, kills=203)
    assert len(plays) == 24
    assert {name for name, _ in plays} == set(SCENARIOS)
    assert sum(kills for _, kills in plays) == 203
    assert all(kills for name, kills in plays if name in KILLING)


@pytest.mark.ray
@pytest.mark.parametrize(("scenario", "kills"), [("killed in the protocol", 5), ("poisoned shard", 0)])
def test_a_run_comes_to_the_same_end_whoever_dies(tmp_path, toy_folder, scenario, kills):
    figures = play(scenario, Path(tmp_path), seed=11, kills=kills, model=toy_folder)
    assert figures.violations == ()
    assert figures.kills.total() >= max(kills, 1)
