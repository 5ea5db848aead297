"""An exported run holds what was committed, no more and no less, in every format, and says what it is."""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
import re
import shutil
from pathlib import Path

import datasets
import duckdb
import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from collector import __main__ as cli
from collector import open_run
from collector.config import DataConfig, ModelConfig
from collector.look.export import export, streams
from collector.look.export.hub import _size_category
from collector.store.run_directory import REJECTS, TABLES, RunDirectory
from collector.store.tables import Layer
from collector.upkeep import maps, verify, weights
from tests.helpers.query_runs import assert_same_rows, few_examples
from tests.helpers.runs import collect_here, run_config
from tests.helpers.synthetic import Shard, write_run

LABELS = ("eng_Latn", 'the "quoted", one', "a\nline|break", "한국어")
BASE = ("routing", "outputs", "similarity", "projections", *TABLES, REJECTS, "vocab", "weights", "maps")
KEYS = {"routing": "shard, stack, layer, tok", "tokens": "shard, tok", "documents": "shard, doc",
        "rejects": "shard, source, row", "vocab": "token_id", "layers": "stack, layer",
        "outputs": "shard, stack, layer, doc, is_special", "similarity": "shard, stack, layer, block, over",
        "projections": "shard, stack, layer, tok, expert", "maps": "stack, layer, method, shard, tok, expert",
        "weights": "stack, layer, measure, expert, other_expert",
        "components": 'stack, layer, component'}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_folder, tiny_model) -> Path:
    """A run with odd labels, texts, probabilities and rejected rows, and with files that count for nothing."""
    root = tmp_path_factory.mktemp("export")
    rows = [{"text": f'Sentence {i}, "so it is"\nand on.', "label": LABELS[i % 4], "id": f"d,{i}"} for i in range(24)]
    rows[5]["text"] = ""
    data = root / "texts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = run_config(
        DataConfig(data=(str(data),), docs_per_shard=8), ModelConfig(model=str(tiny_folder)),
        store=("text", "probabilities", "logits"), record=("outputs", "similarity"), sample_tokens=40,
    )  # fmt: skip
    run = collect_here(root / "run", config, loaded=tiny_model)
    weights.make(run, loaded=tiny_model)
    maps.make(run, layer=0, method="pca")
    first = next(iter(run.commits()))
    shutil.copy(root / "run" / first.files["routing"].path, root / "run" / "data" / "000000-orphan.routing.parquet")
    run.record_failure(2, {"traceback": "once"})
    return root / "run"


def content(connection, table: str) -> pa.Table:
    """All rows of a relation in the order of their keys, in types that all formats have."""
    relation = connection.sql(f"from {table} order by {KEYS[table]}").to_arrow_table()
    wide = {pa.uint8(): pa.int64(), pa.uint16(): pa.int64(), pa.uint32(): pa.int64(), pa.uint64(): pa.int64(),
            pa.int16(): pa.int64(), pa.int32(): pa.int64(), pa.list_(pa.uint16()): pa.list_(pa.int64()),
            pa.list_(pa.uint32()): pa.list_(pa.int64()), pa.list_(pa.int32()): pa.list_(pa.int64())}  # fmt: skip
    fields = [pa.field(field.name, wide.get(field.type, field.type)) for field in relation.schema]
    return relation.cast(pa.schema(fields))


def readable(table: pa.Table) -> pa.Table:
    """DuckDB reads half floats in Parquet, but not in Arrow."""
    half, single = pa.list_(pa.float16()), pa.list_(pa.float32())
    fields = [field.with_type(single) if field.type == half else field for field in table.schema]
    return pa.table([table[field.name].cast(field.type) for field in fields], schema=pa.schema(fields))


def assert_same(exported: duckdb.DuckDBPyConnection, run, table: str) -> None:
    here, there = content(run, table), content(exported, table)
    assert there.column_names == here.column_names
    assert there.to_pylist() == here.to_pylist(), table


def out_of(folder: Path, tmp_path: Path, *arguments: str) -> Path:
    out = tmp_path / "out"
    assert cli.parse(["export", str(folder), str(out), *arguments]).run() == 0
    assert os.listdir(tmp_path) == ["out"]  # noqa: PTH208  # hidden ones too
    return out


# ---- Hugging Face ----


@pytest.fixture(scope="module")
def hub(folder, tmp_path_factory) -> Path:
    return out_of(folder, tmp_path_factory.mktemp("hub"), "--to", "hf")


def front_matter(card: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])


def test_the_card_names_the_files_of_every_table(hub):
    matter = front_matter((hub / "README.md").read_text())
    assert [config["config_name"] for config in matter["configs"]] == list(BASE)
    assert [config["config_name"] for config in matter["configs"] if config.get("default")] == ["routing"]
    named = {path for config in matter["configs"] for path in hub.glob(config["data_files"])}
    assert {path for path in hub.rglob("*.parquet") if path.name[0] != "_"} - named == {hub / "plan.parquet"}
    assert matter["size_categories"] == "1K<n<10K"


def test_datasets_loads_each_table_as_the_run_has_it(folder, hub, tmp_path):
    exported, run = duckdb.connect(), open_run(folder)
    for table in BASE:
        loaded = datasets.load_dataset(str(hub), table, split="train", cache_dir=str(tmp_path))
        exported.register(table, readable(loaded.data.table))
        assert_same(exported, run, table)


def test_the_default_table_streams(hub, folder):
    rows = datasets.load_dataset(str(hub), split="train", streaming=True)
    assert next(iter(rows)).keys() == set(open_run(folder).sql("from routing").columns)


def test_the_folder_is_a_sound_run_without_what_does_not_count(folder, hub):
    report = verify.verify(RunDirectory(hub))
    assert (report.sound, report.complete) == (True, True), list(report.lines())
    for name in ("domain_specialization", "coactivation"):
        assert_same_rows(open_run(hub).query(name).fetchall(), open_run(folder).query(name).fetchall())
    assert not list(hub.rglob("*orphan*"))
    assert not (hub / "failures").exists()
    assert {commit.node for commit in RunDirectory(hub).commits()} == {"node-1"}
    assert {commit.node for commit in RunDirectory(folder).commits()} != {"node-1"}


def test_parts_take_no_room_of_their_own_or_are_copied_from_elsewhere(folder, hub, tmp_path, monkeypatch):
    parts = [part.path for commit in RunDirectory(folder).commits() for part in commit.files.values()]
    assert all((hub / path).samefile(folder / path) for path in parts)
    link = os.link

    def refuse_parts(source, target):
        if ".tmp" not in Path(source).name:
            raise OSError(18, "Invalid cross-device link")
        link(source, target)

    monkeypatch.setattr(os, "link", refuse_parts)
    copied = out_of(folder, tmp_path, "--to", "hf")
    assert not any((copied / path).samefile(folder / path) for path in parts)
    assert verify.verify(RunDirectory(copied)).sound


def test_the_card_says_what_the_run_is_and_how_private(hub, folder):
    card = (hub / "README.md").read_text()
    run = open_run(folder)
    for label, documents, tokens in run.sql("select label, documents, tokens from labels").fetchall():
        cell = " ".join(label.split()).replace("|", "\\|")
        assert f"| {cell} | {documents:,} | {tokens:,} |" in card
    assert run.info["model"]["fingerprint"] in card
    assert run.info["memory"]["summary"] in card
    assert f"| `routing` | {run.sql('select count(*) from routing').fetchall()[0][0]:,} |" in card
    assert "arXiv 2602.04105" in card
    assert "The texts themselves are in `documents`" in card


@pytest.mark.parametrize(
    ("rows", "name"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**6 - 1, "100K<n<1M"), (10**6, "1M<n<10M"),
     (10**11, "100B<n<1T"), (10**12, "n>1T")],
)  # fmt: skip
def test_sizes_have_the_hubs_names(rows, name):
    assert _size_category(rows) == name


# ---- CSV ----


def types_of(run, table: str) -> dict[str, str]:
    relation = run.sql(f"from {table}")
    return {name: str(kind) for name, kind in zip(relation.columns, relation.types, strict=True)}


@pytest.mark.parametrize("packed", [False, True])
def test_csv_gives_every_table_back(folder, tmp_path, packed):
    out = out_of(folder, tmp_path, "--to", "csv", *(["--gzip"] if packed else []))
    exported, run = duckdb.connect(), open_run(folder)
    for table in (*BASE, "layers", "components"):
        path = out / f"{table}.csv{'.gz' if packed else ''}"
        read = "select * from read_csv($path, columns = $types, header = true, allow_quoted_nulls = false)"
        rows = exported.sql(read, params={"path": str(path), "types": types_of(run, table)}).to_arrow_table()
        exported.register(table, rows)
        assert_same(exported, run, table)
    assert "arXiv 2602.04105" in (out / "README.md").read_text()


def test_a_packed_file_unpacks_to_the_plain_one(folder, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain = out_of(folder, tmp_path / "a", "--to", "csv")
    packed = out_of(folder, tmp_path / "b", "--to", "csv", "--gzip")
    assert gzip.decompress((packed / "tokens.csv.gz").read_bytes()) == (plain / "tokens.csv").read_bytes()


@few_examples
@given(label=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12))
def test_any_label_survives_csv(tmp_path_factory, label):
    root = tmp_path_factory.mktemp("csv")
    layers = [Layer(layer=0, n_experts=3, top_k=1)]
    shard = Shard.of_picks(layers, documents=[(label, 2), ("en", 1)], experts={0: [[0], [2], [1]]})
    run = open_run(write_run(root / "run", layers, [shard]))
    streams.write_csv(run, root, gzip=False)
    with (root / "documents.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["label"], row["tokens"]) for row in rows] == [(label, "2"), ("en", "1")]


def test_floats_keep_every_bit_and_null_is_not_the_empty_text(tmp_path):
    layers = [Layer(layer=0, n_experts=4, top_k=2), Layer(layer=1, n_experts=4, top_k=1)]
    weights = np.array([[1 / 3, 1e-30], [math.pi, np.float32(0.1)]], np.float32)
    shard = Shard.of_picks(layers, documents=[("", 2)], experts={0: [[0, 1], [2, 3]], 1: [[0], [1]]},
                           weights={0: weights, 1: weights[:, :1]})  # fmt: skip
    streams.write_csv(open_run(write_run(tmp_path / "run", layers, [shard])), tmp_path, gzip=False)
    lines = (tmp_path / "routing.csv").read_text().splitlines()
    header = [name.strip('"') for name in lines[0].split(",")]
    rows = [dict(zip(header, line.split(","), strict=True)) for line in lines[1:]]
    read = np.array([[row["w0"], row["w1"]] for row in rows if row["layer"] == "0"]).astype(np.float32)
    assert (read == weights).all()
    assert {row["e1"] for row in rows if row["layer"] == "1"} == {""}
    assert {row["label"] for row in rows} == {'""'}


# ---- Delta ----


def test_delta_gives_every_table_back(folder, tmp_path):
    deltalake = pytest.importorskip("deltalake")
    out = out_of(folder, tmp_path, "--to", "delta")
    exported, run = duckdb.connect(), open_run(folder)
    for table in (*BASE, "layers", "components"):
        stored = deltalake.DeltaTable(out / table)
        assert stored.version() == 0
        exported.register(table, pa.table(stored.to_pyarrow_table()))
        assert_same(exported, run, table)


def test_delta_keeps_experts_beyond_127(tmp_path):
    deltalake = pytest.importorskip("deltalake")
    layers = [Layer(layer=200, n_experts=255, top_k=2)]
    shard = Shard.of_picks(layers, documents=[("en", 2)], experts={200: [[0, 254], [127, 128]]})
    streams.write_delta(open_run(write_run(tmp_path / "run", layers, [shard])), tmp_path)
    rows = deltalake.DeltaTable(tmp_path / "routing").to_pyarrow_table().to_pylist()
    assert [(row["layer"], row["e0"], row["e1"]) for row in rows] == [(200, 0, 254), (200, 127, 128)]


# ---- what is refused ----


@pytest.mark.parametrize("to", ["hf", "delta", "csv"])
def test_an_incomplete_run_has_to_be_asked_for(folder, tmp_path, to):
    if to == "delta":
        pytest.importorskip("deltalake")
    shutil.copytree(folder, tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    run.reopen()
    run.store.delete("commits/000002.json")
    with pytest.raises(ValueError, match="is incomplete; --partial"):
        export(run, str(tmp_path / "out"), to)
    done = export(run, str(tmp_path / "out"), to, partial=True)
    assert done.rows["documents"] == 15
    if to == "hf":
        assert not open_run(tmp_path / "out").complete
        assert open_run(tmp_path / "out").sql("select count(*) from documents").fetchall() == [(15,)]
        assert "The run is incomplete: 2 of 3 shards" in (tmp_path / "out" / "README.md").read_text()


def test_a_folder_that_is_taken_is_refused_and_an_empty_one_is_filled(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(ValueError, match="not an empty folder"):
        export(RunDirectory(folder), str(out), "csv")
    (out / "mine").unlink()
    export(RunDirectory(folder), str(out), "csv")
    with pytest.raises(ValueError, match="not an empty folder"):
        export(RunDirectory(folder), str(out), "csv")


def test_what_cannot_be_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="local folder, got s3://bucket/out"):
        export(RunDirectory(folder), "s3://bucket/out", "csv")
    with pytest.raises(FileNotFoundError, match="no run at"):
        export(RunDirectory(tmp_path / "nothing"), str(tmp_path / "out"), "csv")
    with pytest.raises(ValueError, match="--gzip is for --to csv"):
        cli.Export(run_="run", out="out", to="hf", gzip=True)


@pytest.mark.parametrize("to", ["hf", "csv"])
def test_a_damaged_run_leaves_nothing_behind(folder, tmp_path, to):
    shutil.copytree(folder, tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    paths = [commit.files["documents"].path for commit in run.commits()]
    if to == "hf":
        run.store.delete("plan.parquet")
    else:  # a whole file of another shard: only the counts can tell
        shutil.copy(tmp_path / "run" / paths[1], tmp_path / "run" / paths[0])
    with pytest.raises((ValueError, FileNotFoundError)):
        export(run, str(tmp_path / "out"), to)
    assert os.listdir(tmp_path) == ["run"]  # noqa: PTH208


# ---- object stores ----


@pytest.mark.parametrize("to", ["hf", "csv"])
def test_a_run_on_a_store_is_exported_like_a_local_one(folder, tmp_path, to):
    remote = RunDirectory(f"file://{folder}")
    assert type(remote.store).__name__ == "ObjectStore"
    there, here = export(remote, str(tmp_path / "there"), to), export(RunDirectory(folder), str(tmp_path / "here"), to)
    assert there.rows == here.rows
    names = sorted(path.relative_to(tmp_path / "here") for path in (tmp_path / "here").rglob("*") if path.is_file())
    for name in names:
        one, other = ((tmp_path / where / name).read_bytes() for where in ("here", "there"))
        assert sorted(one.splitlines()) == sorted(other.splitlines()), name
