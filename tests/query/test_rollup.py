"""A rollup says what the tables say, is read only while it is current, and is checked, tidied and made by command."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given

from collector.config import DataConfig, ModelConfig
from collector.query.document_counts import document_counts
from collector.query.rollup import files, making
from collector.query.warehouse import Run, list_queries, open_run
from collector.store.run_directory import PLAN, ROLLUP, LocalStore, RunDirectory
from collector.store.tables import Layer
from collector.upkeep import orphans, verify
from tests.helpers.command_line import exit_status
from tests.helpers.query_runs import assert_same, assert_same_rows, few_examples, keyed, random_runs
from tests.helpers.runs import collect_here, run_config, write_jsonl
from tests.helpers.synthetic import Shard, commit_shard, publish_shard, random_shard, write_run

LAYERS = [Layer(layer=1, n_experts=4, top_k=2), Layer(layer=4, n_experts=300, top_k=3, has_capacity=True)]
VIEWS = ("assignments", "document_assignments", "document_counts", "label_counts", "label_statistics")


def shards(count: int = 2) -> list[Shard]:
    rng = np.random.default_rng(5)
    return [random_shard(rng, LAYERS, [("en", 12), ("ko", 9), ("en", 1)]) for _ in range(count)]


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory(write_run(tmp_path / "run", LAYERS, shards()))


def reads_rollup(run: Run) -> bool:
    """Whether counts come from a rollup."""
    return bool(run.sql("select 1 from duckdb_views() where view_name = 'document_rollup'").fetchall())


def assert_rows(found: Run, expected: Run, relation: str) -> None:
    """The same columns and rows; floats up to float32's rounding."""
    a, b = (one.sql(f"select * from {relation} order by all") for one in (found, expected))
    assert (a.columns, a.types) == (b.columns, b.types)
    numbers = [str(kind) in ("FLOAT", "DOUBLE", "FLOAT[]") for kind in a.types]
    for x, y in zip(a.fetchall(), b.fetchall(), strict=True):
        for got, wanted, number in zip(x, y, numbers, strict=True):
            assert got == (pytest.approx(wanted, rel=1e-5, abs=1e-6) if number else wanted)


def damage(run: RunDirectory, relation: str, change) -> str:
    """Replaces a file of the rollup by what `change` makes of its table; returns its name."""
    name = files.current(run)[relation]
    path = Path(run.store.location(name))
    table = pq.read_table(path)
    pq.write_table(change(table), path, row_group_size=1000)
    return name


def put(table: pa.Table, column: str, values) -> pa.Table:
    index = table.schema.get_field_index(column)
    return table.set_column(index, table.schema.field(index), pa.array(values, table.schema.field(index).type))


# ---- the same as the tables ----


@few_examples
@given(random=random_runs())
def test_every_count_is_that_of_the_tables(random, tmp_path_factory) -> None:
    layers, all_shards = random
    directory = RunDirectory(write_run(tmp_path_factory.mktemp("rollup") / "run", layers, all_shards))
    tables = open_run(directory.root)
    making.make(directory)
    rollup = open_run(directory.root)
    assert reads_rollup(rollup)
    assert not reads_rollup(tables)
    for view in VIEWS:
        assert_rows(rollup, tables, view)
    for ours, theirs in zip(document_counts(rollup), document_counts(tables), strict=True):
        np.testing.assert_array_equal(ours.picks_DE, theirs.picks_DE)
        np.testing.assert_array_equal(ours.top1_DE, theirs.top1_DE)
        np.testing.assert_allclose(ours.weight_sum_DE, theirs.weight_sum_DE, rtol=1e-6)
        assert (ours.labels, ours.tokens_D.tolist()) == (theirs.labels, theirs.tokens_D.tolist())
    shutil.rmtree(Path(directory.root).parent)


@pytest.mark.parametrize(
    ("name", "keys"),
    [("domain_specialization", 5), ("selection_frequency", 5), ("dropped_tokens", 4), ("load_balance", 4)],
)
@pytest.mark.parametrize("include_special", [True, False])
def test_a_query_gives_the_same_with_and_without(run, name, keys, include_special) -> None:
    before = keyed(open_run(run.root), name, keys, include_special=include_special)
    making.make(run)
    assert_same(keyed(open_run(run.root), name, keys, include_special=include_special), before)


def test_row_groups_hold_one_router_and_many_shards(run, monkeypatch) -> None:
    making.make(run)
    path = run.store.location(files.current(run)[files.DOCUMENTS])
    whole = pq.ParquetFile(path)
    assert whole.num_row_groups == len(LAYERS)
    assert whole.read_row_group(0).column("shard").unique().to_pylist() == [0, 1]
    monkeypatch.setattr(making, "_GATHERED", 1)
    making.make(run)
    parts = pq.ParquetFile(path)
    assert parts.num_row_groups == 2 * len(LAYERS)
    assert parts.read().sort_by([("layer", "ascending"), ("shard", "ascending")]).equals(whole.read())


def test_a_condition_on_the_layer_reaches_the_files(run) -> None:
    making.make(run)
    opened = open_run(run.root)
    for view in ("assignments", "document_assignments", "document_counts", "label_statistics"):
        plan = opened.connection.sql(f"explain select * from {view} where layer = 4").fetchall()[0][1]
        assert "Filters: layer = 4" in plan, view


def test_every_query_answers_the_same_over_a_rollup(run) -> None:
    making.make(run)
    rolled_up, counted = open_run(run.root), open_run(run.root, rollup=False)
    for query in list_queries():
        assert_same_rows(rolled_up.query(query.name).fetchall(), counted.query(query.name).fetchall())


def test_a_shard_without_documents_adds_nothing(tmp_path) -> None:
    none = Shard.of_picks(LAYERS, documents=[], experts={1: [], 4: []})
    run = RunDirectory(write_run(tmp_path / "run", LAYERS, [none, shards(1)[0], none]))
    making.make(run)
    for view in VIEWS:
        assert_rows(open_run(run.root), open_run(run.root, rollup=False), view)


def test_a_run_without_a_commit_has_an_empty_rollup(tmp_path) -> None:
    run = RunDirectory(write_run(tmp_path / "run", LAYERS, [], complete=False))
    made = making.make(run)
    assert (made.shards, made.tokens) == (0, 0)
    assert open_run(run.root).sql("select count(*) from document_assignments").fetchall() == [(0,)]


# ---- current or stale ----


def test_a_stale_rollup_is_never_read(tmp_path) -> None:
    one, other = shards()
    run = RunDirectory(write_run(tmp_path / "run", LAYERS, [one], complete=False))
    first = making.make(run).files
    commit_shard(run, 1, publish_shard(run, LAYERS, 1, other), other)
    assert files.current(run) == {}
    opened = open_run(run.root)
    assert not reads_rollup(opened)
    assert opened.sql("select sum(top1) from assignments").fetchall() == [(4 * 22,)]
    second = making.make(run).files
    assert not set(first.values()) & set(second.values())
    assert reads_rollup(open_run(run.root))
    assert_rows(open_run(run.root), open_run(run.root, rollup=False), "assignments")


def test_a_shard_that_was_collected_again_makes_it_stale(run) -> None:
    before = making.make(run).files
    attempt = run.read_commit(1)
    run.reopen()
    run.set_aside(1)
    parts = publish_shard(run, LAYERS, 1, shards()[1], attempt="b")
    run.commit(type(attempt)(**{**vars(attempt), "attempt": "b", "files": parts}))
    assert files.current(run) == {}
    assert making.make(run).files != before


def test_one_of_two_files_is_no_rollup(run) -> None:
    names = making.make(run).files
    run.store.delete(names[files.LABELS])
    assert files.current(run) == {}
    assert not reads_rollup(open_run(run.root))


class DyingStore(LocalStore):
    """Publishes the documents, and dies before the assignments."""

    def publish(self, scratch: Path, name: str) -> None:
        if "assignments" in name:
            raise KeyboardInterrupt
        super().publish(scratch, name)


def test_a_rollup_that_was_cut_short_is_none_and_is_made_again(run) -> None:
    with pytest.raises(KeyboardInterrupt):
        making.make(RunDirectory(run.root, store=DyingStore(Path(run.root))))
    assert len(run.store.list(ROLLUP)) == 1
    assert files.current(run) == {}
    assert not list(Path(run.root, ".scratch").iterdir())
    making.make(run)
    assert files.current(run)


def test_readers_write_nothing(run) -> None:
    before = {path for path in Path(run.root).rglob("*") if path.is_file()}
    opened = open_run(run.root)
    opened.query("top_experts").fetchall()
    list(document_counts(opened))
    assert {path for path in Path(run.root).rglob("*") if path.is_file()} == before


# ---- orphans ----


def test_gc_takes_stale_rollups_and_leaves_the_current_one(tmp_path) -> None:
    one, other = shards()
    run = RunDirectory(write_run(tmp_path / "run", LAYERS, [one], complete=False))
    run.store.put(PLAN, b"a plan")
    stale = making.make(run).files
    commit_shard(run, 1, publish_shard(run, LAYERS, 1, other), other)
    current = making.make(run).files
    assert {entry.name for entry in orphans.find(run, 0)} == set(stale.values())
    assert orphans.find(run, 3600) == []
    then = time.time() - 7200
    for path in Path(run.root, ROLLUP).iterdir():
        os.utime(path, (then, then))
    assert exit_status("gc", run.root, "--older-than", "1h") == 0
    assert set(run.store.list(ROLLUP)) == set(current.values())


# ---- by command, over a run as it is collected ----


@pytest.fixture(scope="module")
def original(tmp_path_factory, tiny_folder, tiny_model) -> RunDirectory:
    """20 documents in three shards."""
    folder = tmp_path_factory.mktemp("collected")
    data = DataConfig(data=(str(write_jsonl(folder / "texts.jsonl", 20)),), docs_per_shard=8)
    return collect_here(folder / "run", run_config(data, ModelConfig(model=str(tiny_folder))), loaded=tiny_model)


@pytest.fixture
def collected(original, tmp_path) -> RunDirectory:
    """A copy to change."""
    return RunDirectory(shutil.copytree(original.root, tmp_path / "run"))


def test_the_command_makes_it_once(collected, capsys) -> None:
    assert exit_status("rollup", collected.root) == 0
    names = files.current(collected)
    out = capsys.readouterr().out
    assert all(name in out for name in names.values())
    assert ": 3 shards, " in out
    assert " a token\n" in out
    made = Path(collected.store.location(names[files.DOCUMENTS])).stat().st_mtime_ns
    assert exit_status("rollup", collected.root) == 0
    assert "already there, and up to date" in capsys.readouterr().out
    assert Path(collected.store.location(names[files.DOCUMENTS])).stat().st_mtime_ns == made
    assert exit_status("rollup", collected.root, "--again") == 0
    assert Path(collected.store.location(names[files.DOCUMENTS])).stat().st_mtime_ns > made
    for view in VIEWS:
        assert_rows(open_run(collected.root), open_run(collected.root, rollup=False), view)


def test_the_command_needs_a_run(tmp_path, capsys) -> None:
    assert exit_status("rollup", str(tmp_path / "nothing")) == 2
    assert "run.json" in capsys.readouterr().err
    assert not (tmp_path / "nothing" / ROLLUP).exists()


def test_a_sound_rollup_is_told_as_such(collected, capsys) -> None:
    making.make(collected)
    assert exit_status("verify", collected.root) == 0
    out = capsys.readouterr().out
    assert out == "sound: all of 3 committed shards are correct, and so is the rollup\n"


@pytest.mark.parametrize(
    ("relation", "change", "message"),
    [
        (
            files.DOCUMENTS,
            lambda table: put(table, "tokens", [*table["tokens"].to_pylist()[:-1], 99]),
            "has other counts of shard 2 than its tables give",
        ),
        (
            files.DOCUMENTS,
            lambda table: put(
                table, "picks", [[n + 1 for n in table["picks"][0].as_py()], *table["picks"][1:].to_pylist()]
            ),
            "has other counts of shard 0 than its tables give",
        ),
        (
            files.DOCUMENTS,
            lambda table: put(
                table, "weight_sums", [[*row[:-1], row[-1] + 0.01] for row in table["weight_sums"].to_pylist()]
            ),
            "has other counts of shard 0 than its tables give",
        ),
        (files.DOCUMENTS, lambda table: table[:-1], "has other counts of shard 2 than its tables give"),
        (
            files.DOCUMENTS,
            lambda table: pa.concat_tables([table, put(table[:1], "shard", [7])]),
            "has rows of shards that are not committed",
        ),
        (files.DOCUMENTS, lambda table: table.drop_columns("margin"), "has other columns than a rollup has"),
        (
            files.LABELS,
            lambda table: put(table, "top1", [table["top1"][0].as_py() + 1, *table["top1"][1:].to_pylist()]),
            "has other counts of labels than the tables give",
        ),
        (files.LABELS, lambda table: table[1:], "has other counts of labels than the tables give"),
    ],
)
def test_verify_finds_a_wrong_rollup(collected, capsys, relation, change, message) -> None:
    making.make(collected)
    name = damage(collected, relation, change)
    assert exit_status("verify", collected.root, "--recollect") == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{name} {message}"
    assert (
        out[-1] == "unsound: 0 of 3 committed shards are wrong, and so is the rollup: "
        "`collector rollup RUN --again` counts again"
    )
    assert collected.committed_shards() == {0, 1, 2}, "no shard is to blame"
    assert exit_status("rollup", collected.root, "--again") == 0
    assert verify.verify(collected).sound


def test_verify_finds_a_rollup_that_cannot_be_read(collected) -> None:
    for relation, name in making.make(collected).files.items():
        kept = collected.store.read(name)
        collected.store.put(name, kept[:-4] + b"PAR0")
        report = verify.verify(collected)
        assert report.rollup
        assert all(line.startswith(f"{name} cannot be read") for line in report.rollup), relation
        collected.store.put(name, kept)
    assert verify.verify(collected).sound


def test_verify_says_nothing_of_a_stale_rollup(collected) -> None:
    making.make(collected)
    damage(collected, files.DOCUMENTS, lambda table: table[:0])
    collected.reopen()
    collected.set_aside(2)
    report = verify.verify(collected)
    assert (report.sound, report.rollup, report.missing) == (True, None, [2])
