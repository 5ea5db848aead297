"""A dump becomes a run like any other: whole, resumable, verifiable; and what cannot become one costs a line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from collector.config import ImportConfig
from collector.data.dumps import sglang
from collector.query.warehouse import open_run
from collector.replica import importing
from collector.replica.importing import import_dump
from collector.store.run_directory import RunDirectory
from collector.upkeep.verify import verify
from tests.helpers import dumps
from tests.helpers.command_line import collector
from tests.helpers.dumps import Routed
from tests.helpers.runs import assert_same_content, content

CONFIG = ImportConfig(model="served", experts=6, docs_per_shard=2)


def routed(documents: int = 7) -> list[Routed]:
    rng = np.random.default_rng(2)
    return [
        Routed(
            id=f"d{number}", label=("en", "ko")[number % 2], token_ids=rng.integers(0, 50, 3 + number),
            experts=np.argsort(rng.random((3 + number, 2, 6)), axis=2)[:, :, :2],
        )
        for number in range(documents)
    ]  # fmt: skip


@pytest.fixture
def dump(tmp_path) -> Path:
    return dumps.write_lines(tmp_path / "out.jsonl", [dumps.vllm(one, 2) for one in routed()])


def vllm(dump: Path, out: Path, config: ImportConfig = CONFIG) -> RunDirectory:
    run, _ = import_dump(str(dump), str(out), "vllm", config)
    return run


def is_sound(run: RunDirectory) -> bool:
    report = verify(run)
    assert [*report.lines()][-1].startswith("sound"), [*report.lines()]
    return report.complete


def test_every_token_but_the_last_of_each_document_is_there_once(dump, tmp_path):
    run = vllm(dump, tmp_path / "run")
    assert is_sound(run)
    documents = routed()
    tables = content(run)
    assert tables["documents"]["doc_id"].to_pylist() == [one.id for one in documents]
    assert tables["documents"]["characters"].null_count == 7
    assert tables["tokens"]["token_id"].to_pylist() == [i for one in documents for i in one.token_ids[:-1].tolist()]
    rows = tables["routing"]
    for layer in range(2):
        own = rows.filter(np.array(rows["layer"].to_pylist()) == layer)
        assert list(zip(own["e0"].to_pylist(), own["e1"].to_pylist(), strict=True)) == [
            tuple(pick) for one in documents for pick in one.experts[:-1, layer].tolist()
        ]
        assert own["w0"].null_count == own["entropy"].null_count == len(own)


def test_run_json_says_what_the_source_does_not_have(dump, tmp_path):
    info = vllm(dump, tmp_path / "run").read_json("run.json")
    assert info["imported"]["from"] == "vllm"
    assert {"weights", "entropy", "margin", "characters"} <= set(info["imported"]["lacks"])
    assert [(one["layer"], one["n_experts"], one["top_k"]) for one in info["layers"]] == [(0, 6, 2), (1, 6, 2)]


def test_an_import_that_was_interrupted_goes_on_and_repeats_nothing(dump, tmp_path, monkeypatch):
    whole = vllm(dump, tmp_path / "whole")
    write, written = importing.Importer._write, []

    def interrupted(self, read):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(read.shard)
        return write(self, read)

    with monkeypatch.context() as patched:
        patched.setattr(importing.Importer, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            vllm(dump, tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    assert run.committed_shards() == {0, 1}
    assert not is_sound(run)
    before = {commit.shard: commit.attempt for commit in run.commits()}
    assert vllm(dump, tmp_path / "run").committed_shards() == {0, 1, 2, 3}
    assert is_sound(run)
    assert before.items() <= {commit.shard: commit.attempt for commit in run.commits()}.items()
    assert_same_content(run, whole)
    again = {commit.shard: commit.attempt for commit in run.commits()}
    vllm(dump, tmp_path / "run")
    assert {commit.shard: commit.attempt for commit in run.commits()} == again


def test_another_dump_or_setting_does_not_go_on_with_a_run(dump, tmp_path):
    vllm(dump, tmp_path / "run")
    with pytest.raises(ValueError, match="--experts was 6, is now 8"):
        vllm(dump, tmp_path / "run", ImportConfig(model="served", experts=8, docs_per_shard=2))
    dumps.write_lines(dump, [dumps.vllm(one, 2) for one in routed(3)])
    with pytest.raises(ValueError, match=r"out.jsonl has changed"):
        vllm(dump, tmp_path / "run")


def test_lost_tokens_end_an_import_which_goes_on_without_them(dump, tmp_path):
    documents = routed()
    documents[4].experts[1:3] = 0
    dumps.write_lines(dump, [dumps.vllm(one, 2) for one in documents])
    with pytest.raises(ValueError, match="2 of 6 tokens of document d4 have no routing"):
        vllm(dump, tmp_path / "run")
    config = ImportConfig(model="served", experts=6, docs_per_shard=2, lost="drop")
    run, said = import_dump(str(dump), str(tmp_path / "run"), "vllm", config)
    assert said == ["2 tokens without routing were left out"]
    assert is_sound(run)
    places = "select position from tokens inner join documents using (shard, doc) where doc_id = 'd4' order by 1"
    assert open_run(run.root).sql(places).fetchall() == [(0,), (3,), (4,), (5,)]


def test_verify_sees_positions_that_fall(dump, tmp_path):
    run = vllm(dump, tmp_path / "run")
    part = Path(run.store.location(next(run.commits()).files["tokens"].path))
    table = pq.read_table(part)
    place = table.schema.get_field_index("position")
    table = table.set_column(place, table.schema.field(place), table["position"].take(np.arange(len(table))[::-1]))
    from collector.upkeep.verify import tables
    from collector.upkeep.verify.reading import Card

    pq.write_table(table, tmp_path / "tokens")
    commit, card = next(run.commits()), Card.of(run.read_json("run.json"))
    paths = {name: Path(run.store.location(part.path)) for name, part in commit.files.items()}
    found = list(tables.problems(paths | {"tokens": tmp_path / "tokens"}, commit, card))
    assert found == ["tokens.position does not rise in a document of the decoder"]


def test_bad_lines_are_rejects_and_a_dump_of_them_alone_is_no_success(dump, tmp_path):
    good = [dumps.vllm(one, 2) for one in routed(2)]
    dumps.write_lines(dump, [good[0], "{", good[1]])
    run = vllm(dump, tmp_path / "run")
    assert is_sound(run)
    assert open_run(run.root).sql("select row, reason from rejects").fetchall() == [(1, "invalid JSON")]


def test_labels_ids_and_vocabulary_are_found(tmp_path, tiny_folder):
    records = [dumps.vllm(one, 2) | {"meta": {"lang": f"l{number}"}} for number, one in enumerate(routed(3))]
    dump = dumps.write_lines(tmp_path / "out.jsonl", records)
    config = ImportConfig(
        model="served", experts=6, label_column="{meta.lang}-{label}", id_column="none", tokenizer=str(tiny_folder)
    )
    run = open_run(vllm(dump, tmp_path / "run", config).root)
    assert run.sql("select doc_id, label from documents order by doc").fetchall() == [
        ("out.jsonl#0", "l0-en"), ("out.jsonl#1", "l1-ko"), ("out.jsonl#2", "l2-en"),
    ]  # fmt: skip
    spelled, special = run.sql("select count(token), count_if(is_special) from labelled_tokens").fetchall()[0]
    assert spelled == run.sql("select count(*) from tokens").fetchall()[0][0]
    (ids,) = run.sql("select count(*) from tokens inner join vocab using (token_id) where vocab.is_special").fetchall()[
        0
    ]
    assert special == ids


def test_files_of_the_recorder_become_one_run(tmp_path):
    experts = np.array([[0, 1, 2, 3, 4, 5]] * 2)
    for rank in range(2):
        passes = [dumps.recorded_pass(routed(3), 2, (0, 1), experts) for _ in range(2)]
        dumps.write_recorder(tmp_path / "dump", rank, passes, experts)
    config = ImportConfig(model="served", docs_per_shard=4)
    run, said = import_dump(str(tmp_path / "dump"), str(tmp_path / "run"), "sglang", config)
    sglang._load.cache_clear()  # its file is mapped
    assert said == []
    assert is_sound(run)
    assert open_run(run.root).sql("select count(*), count(distinct doc_id) from documents").fetchall() == [(12, 12)]


# -- the command line --------------------------------------------------------------------------------


def test_the_command_imports_and_says_what_there_is(dump, tmp_path):
    done = collector(
        "import", str(dump), str(tmp_path / "run"), "--from", "vllm", "--model", "served", "--experts", "6"
    )
    assert done.returncode == 0, done.stderr
    assert "served (imported from vllm, without weights, entropy" in " ".join(done.stdout.split())
    for command in (["status"], ["status", "--summary"], ["verify"], ["rollup"], ["verify"], ["show"]):
        done = collector(command[0], str(tmp_path / "run"), *command[1:])
        assert done.returncode == 0, done.stderr
    done = collector("query", str(tmp_path / "run"), "layer_transition")
    assert done.returncode == 2
    assert done.stderr == (
        "collector: layer_transition cannot be answered: weights of the chosen experts are not in a dump of vllm, from "
        "which the run was imported\n"
    )


def test_what_cannot_be_imported_costs_one_line(dump, tmp_path):
    done = collector("import", str(dump), str(tmp_path / "run"), "--from", "vllm", "--model", "served")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--experts: responses do not tell" in done.stderr
    assert not (tmp_path / "run").exists()
    dump.write_text(json.dumps(dumps.vllm(routed(1)[0], 2)) + "\n{\n")
    dump.write_text("{\n")
    done = collector(
        "import", str(dump), str(tmp_path / "run"), "--from", "vllm", "--model", "served", "--experts", "6"
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert not (tmp_path / "run").exists()


def test_an_engines_dump_plans_the_placement_of_its_experts(tmp_path):
    dense = [dataclasses.replace(one, experts=np.insert(one.experts, 0, 0, axis=1)) for one in routed()]
    run = vllm(dumps.write_lines(tmp_path / "out.jsonl", [dumps.vllm(one, 2) for one in dense]), tmp_path / "run")
    done = collector("export", run.root, str(tmp_path / "placement"), "--to", "sglang", "--gpus", "2")
    assert done.returncode == 0, done.stderr
    placement = json.loads((tmp_path / "placement" / "init_expert_location.json").read_text())
    assert [sorted(row) for row in placement["physical_to_logical_map"]] == [[0, 1, 2, 3, 4, 5]] * 3
