"""Verify finds what is wrong with a run, names the shard, and lets exactly the wrong shards be collected again."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer, SwitchTransformersConfig, SwitchTransformersModel

from collector.config import DataConfig, ModelConfig
from collector.look import terminal
from collector.models import loading
from collector.models.loading import DEMO_MODEL
from collector.store.run_directory import MANIFEST, RUN, SUCCESS, VOCAB, LocalStore, RunDirectory, sha256_of
from collector.upkeep import verify
from tests.helpers.command_line import exit_status
from tests.helpers.runs import assert_same_content, collect_here, run_config, write_jsonl
from tests.helpers.tiny_models import SWITCH

SHARDS = 3


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_folder):
    """20 documents and two bad rows in three shards."""
    texts = write_jsonl(tmp_path_factory.mktemp("verify") / "texts.jsonl", 20)
    texts.write_text(texts.read_text() + '{"text": ""}\nno json\n')
    return run_config(DataConfig(data=(str(texts),), docs_per_shard=8), ModelConfig(model=str(tiny_folder)))


@pytest.fixture(scope="module")
def original(tmp_path_factory, config, tiny_model) -> RunDirectory:
    return collect_here(tmp_path_factory.mktemp("verify") / "run", config, loaded=tiny_model)


@pytest.fixture
def run(original, tmp_path) -> RunDirectory:
    """A copy to damage."""
    return RunDirectory(shutil.copytree(original.root, tmp_path / "run"))


def path_of(run: RunDirectory, shard: int, table: str) -> Path:
    return Path(run.store.location(run.read_commit(shard).files[table].path))


def amend(run: RunDirectory, shard: int, /, **fields: object) -> None:
    """Changes a commit record, and takes the marks that would show the change away."""
    run.reopen()
    record = dataclasses.replace(run.read_commit(shard), **fields)
    run.store.put(f"commits/{shard:06d}.json", record.to_json())


def rewrite(run: RunDirectory, shard: int, table: str, change) -> None:
    """Replaces a table by what `change` makes of it, with a commit record of the right size, hash and rows."""
    path = path_of(run, shard, table)
    changed = change(pq.read_table(path))
    pq.write_table(changed, path)
    record = run.read_commit(shard)
    part = dataclasses.replace(
        record.files[table], rows=changed.num_rows, bytes=path.stat().st_size, sha256=sha256_of(path)
    )
    count = {"routing": "rows", "tokens": "tokens", "documents": "documents"}.get(table)
    amend(run, shard, files={**record.files, table: part}, **({count: changed.num_rows} if count else {}))


def put(table: pa.Table, column: str, value: object, row: int = 0) -> pa.Table:
    """The table with another value in one place."""
    values = table[column].to_pylist()
    values[row] = value
    index = table.schema.get_field_index(column)
    field = table.schema.field(index)
    array = (
        pa.array(values, field.type.value_type).dictionary_encode() if pa.types.is_dictionary(field.type) else values
    )
    array = array.cast(field.type) if isinstance(array, pa.Array) else pa.array(array, field.type)
    return table.set_column(index, field.with_nullable(True), array)


# ---- sound runs ----


def test_a_run_as_it_was_collected_is_sound(run, capsys):
    seen = []
    report = verify.verify(run, lambda done, of: seen.append((done, of)))
    assert (report.sound, report.complete, report.shards) == (True, True, SHARDS)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert exit_status("verify", run.root) == 0
    assert capsys.readouterr().out == "sound: all of 3 committed shards are correct\n"


def test_verifying_writes_nothing(run):
    before = {path: path.stat().st_mtime_ns for path in Path(run.root).rglob("*")}
    verify.verify(run)
    assert {path: path.stat().st_mtime_ns for path in Path(run.root).rglob("*")} == before


@pytest.mark.parametrize(
    ("family", "capture"),
    [
        ("olmoe", {"token_ids": "drop"}),
        ("olmoe", {"store": ("text", "probabilities", "logits")}),
        ("olmoe", {"layers": (1,)}),
        ("switch", {}),
        ("switch", {"stacks": ("encoder", "decoder")}),
        ("switch", {"stacks": ("decoder",)}),
    ],
)
def test_runs_of_every_kind_are_sound(tmp_path, config, family, capture, switch_folder, tiny_folder):
    folder = {"olmoe": tiny_folder, "switch": switch_folder}[family]
    loaded = loading.load(ModelConfig(model=str(folder)), "cpu")
    settings = run_config(config.data, ModelConfig(model=str(folder)), **capture)
    run = collect_here(tmp_path / "run", settings, loaded=loaded)
    assert list(verify.verify(run).lines()) == ["sound: all of 3 committed shards are correct"]


@pytest.fixture(scope="module")
def switch_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("switch")
    torch.manual_seed(3)
    SwitchTransformersModel(SwitchTransformersConfig(**SWITCH)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(folder)
    return folder


def test_a_run_that_lacks_shards_is_incomplete_and_not_unsound(run, capsys):
    run.reopen()
    run.store.delete("commits/000001.json")
    report = verify.verify(run)
    assert (report.sound, report.complete, report.missing) == (True, False, [1])
    assert exit_status("verify", run.root) == 1
    assert capsys.readouterr().out.splitlines() == [
        "incomplete: 1 of 3 shards are not committed (1)",
        "sound: all of 2 committed shards are correct",
    ]
    assert exit_status("verify", run.root, "--recollect") == 1
    assert run.committed_shards() == {0, 2}, "nothing is set aside"


def test_a_run_that_has_only_been_planned_is_incomplete(run):
    for path in Path(run.root).iterdir():
        if path.name != "plan.parquet":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    report = verify.verify(run)
    assert (report.sound, report.missing) == (True, [0, 1, 2])


def test_no_run_is_an_error(tmp_path, capsys):
    assert exit_status("verify", str(tmp_path / "nothing")) == 2
    assert "no run at" in capsys.readouterr().err


# ---- files and records ----


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0x10
    path.write_bytes(data)


FILES = [
    (lambda run: path_of(run, 1, "routing").unlink(), r"data/000001-\w+.routing.parquet is missing"),
    (lambda run: flip(path_of(run, 1, "documents")), r"documents.parquet has another SHA-256 than was committed"),
    (lambda run: path_of(run, 1, "tokens").write_bytes(b""), r"tokens.parquet has 0 bytes instead of [\d,]+"),
    (lambda run: amend(run, 1, plan_hash="old"), r"its commit record belongs to another plan \(old\)"),
    (lambda run: amend(run, 1, shard=2), "its commit record is that of shard 2"),
    (lambda run: amend(run, 1, documents=7), "7 documents and 0 skipped rows of 8 planned rows"),
    (lambda run: amend(run, 1, rows=5), r"its commit record says 5 and \d+ rows of routing"),
    (
        lambda run: amend(run, 1, files={"routing": run.read_commit(1).files["routing"]}),
        "its commit record names the tables routing",
    ),
    (
        lambda run: run.store.put("commits/000001.json", run.store.read("commits/000001.json")[:100]),
        r"its commit record is damaged \([A-Z][^)]*line \d+ column \d+",
    ),
    (lambda run: run.store.put("commits/000001.json", b"{}"), r"its commit record is damaged \('files'\)"),
    (lambda run: run.store.put("commits/000001.json", b"null"), "its commit record is damaged"),
]


@pytest.mark.parametrize(("damage", "message"), FILES)
def test_a_wrong_file_or_record_is_named_with_its_shard(run, damage, message):
    damage(run)
    report = verify.verify(run)
    assert list(report.wrong) == [1]
    assert not report.sound
    lines = list(report.lines())
    assert any(re.search(rf"shard 1: .*({message})", line) for line in lines), lines
    assert lines[-1] == "unsound: 1 of 3 committed shards are wrong"


# ---- tables ----


def router(layer: int):
    """The first row of a layer."""
    return lambda table: table["layer"].to_pylist().index(layer)


def in_layer(layer: int, column: str, value: object):
    return lambda table: put(table, column, value, router(layer)(table))


def other_expert(table: pa.Table) -> pa.Table:
    return put(table, "e1", table["e0"][0].as_py())


TABLES = [
    ("routing", in_layer(1, "e0", 6), "decoder layer 1: an expert id is not below 6 in 1 rows"),
    ("routing", in_layer(1, "e1", None), "routing.e1 is null in 1 rows"),
    ("routing", other_expert, "decoder layer 0: an expert is chosen twice in 1 rows"),
    ("routing", in_layer(2, "w0", float("nan")), "decoder layer 2: a weight is not finite in 1 rows"),
    ("routing", in_layer(2, "entropy", float("inf")), "decoder layer 2: entropy is not finite in 1 rows"),
    ("routing", in_layer(0, "tok", 1), "decoder layer 0: of the tokens of its stack number 0 is missing"),
    ("routing", in_layer(0, "tok", 1), "decoder layer 0: of the tokens of its stack number 1 occurs more than once"),
    ("routing", in_layer(0, "tok", 10**6), "decoder layer 0: tok is no token in 1 rows"),
    ("routing", in_layer(0, "layer", 9), "routing of decoder layer 9, which the run does not record, in 1 rows"),
    ("routing", in_layer(0, "stack", "encoder"), "routing of encoder layer 0, which the run does not record, in 1"),
    ("routing", in_layer(0, "label", "ko"), "decoder layer 0: label is not its document's in 1 rows"),
    ("routing", in_layer(0, "label", "xx"), "decoder layer 0: label is not its document's in 1 rows"),
    ("routing", lambda t: put(t, "is_special", not t["is_special"][0].as_py()), "is_special is not its token's in 1"),
    ("routing", lambda t: put(t, "shard", 2), "routing.shard is another shard's in 1 rows"),
    ("routing", lambda t: t.slice(1), "decoder layer 0: of the tokens of its stack number 0 is missing"),
    ("routing", lambda t: pa.concat_tables([t, t.slice(0, 1)]), "number 0 occurs more than once, with 0 others"),
    ("routing", lambda t: t.drop_columns("margin"), "routing has other columns than the run's settings give: margin"),
    ("tokens", lambda t: put(t, "tok", 5, 3), "tokens: tok 3 is missing, with 0 others"),
    ("tokens", lambda t: put(t, "tok", 5, 3), "tokens: tok 5 occurs more than once, with 0 others"),
    ("tokens", lambda t: put(t, "doc", 99), "tokens.doc is no document in 1 rows"),
    ("tokens", lambda t: put(t, "doc", 1), "document 0 has"),
    ("tokens", lambda t: put(t, "position", 1), "tokens of the decoder: the place 0 is missing"),
    ("tokens", lambda t: put(t, "position", 999), "tokens.position is beyond its document in the decoder"),
    ("tokens", lambda t: put(t, "token_id", None), "tokens.token_id is null in 1 rows"),
    ("tokens", lambda t: put(t, "stack", "other"), "tokens.stack is neither encoder nor decoder in 1 rows"),
    ("tokens", lambda t: t.slice(0, len(t) - 1), "has"),
    ("documents", lambda t: put(t, "doc", 1), "documents: doc 0 is missing, with 0 others"),
    ("documents", lambda t: put(t, "doc", 1), "documents: doc 1 occurs more than once, with 0 others"),
    ("documents", lambda t: put(t, "doc", 1000), "documents.doc is beyond the shard's documents in 1 rows"),
    ("documents", lambda t: put(t, "doc_id", None), "documents.doc_id is null in 1 rows"),
    ("documents", lambda t: put(t, "tokens", 1), "tokens of the decoder instead of 1"),
    ("documents", lambda t: put(t, "characters", 1), "characters, 0 truncated; the commit record says"),
    ("documents", lambda t: put(t, "target_tokens", 3), "documents.target_tokens is null in 7 of 8 rows"),
]


@pytest.mark.parametrize(("table", "change", "message"), TABLES)
def test_a_table_that_holds_what_none_may_hold_is_named_with_its_shard(run, table, change, message):
    rewrite(run, 1, table, change)
    report = verify.verify(run)
    assert list(report.wrong) == [1]
    assert any(message in line for line in report.wrong[1]), report.wrong[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: pa.concat_tables([t, t.slice(0, 1)]), "its commit record says 2 and 3 rows of rejects"),
        (lambda t: put(t, "row", t["row"][1].as_py()), "rejects: a row occurs twice in 1 rows"),
        (lambda t: put(t, "reason", "other"), "rejects holds other reasons"),
        (lambda t: put(t, "shard", 0), "rejects.shard is another shard's in 1 rows"),
    ],
)
def test_rejects_are_the_skipped_rows(run, change, message):
    rewrite(run, 2, "rejects", change)
    wrong = verify.verify(run).wrong
    assert list(wrong) == [2]
    assert any(message in line for line in wrong[2])


def test_picks_beyond_a_routers_k_and_values_of_other_experts_are_found(tmp_path, config, tiny_folder, tiny_model):
    settings = run_config(config.data, ModelConfig(model=str(tiny_folder)), store=("probabilities", "logits"))
    run = collect_here(tmp_path / "run", settings, loaded=tiny_model)
    rewrite(run, 0, "routing", lambda t: put(t, "probabilities", [0.5, 0.5]))
    rewrite(run, 1, "routing", lambda t: put(t, "probabilities", [float("nan")] * 6))
    rewrite(run, 2, "routing", lambda t: put(t, "logits", [float("-inf")] * 5 + [float("nan")]))
    info = run.read_json(RUN)
    info["layers"][2]["top_k"] = 1
    wrong = verify.verify(run).wrong
    assert wrong == {
        0: ["decoder layer 0: probabilities are not of 6 experts in 1 rows"],
        1: ["decoder layer 0: probabilities are not finite in 6 rows"],
        2: ["decoder layer 0: logits are not finite in 1 rows"],
    }
    run.store.put(RUN, json.dumps(info).encode())
    tokens = run.read_commit(2).tokens
    assert f"decoder layer 2: more picks than its k of 1 in {tokens} rows" in verify.verify(run).wrong[2]


def test_ids_in_a_run_that_drops_them_are_found(tmp_path, config, tiny_folder, tiny_model):
    settings = run_config(config.data, ModelConfig(model=str(tiny_folder)), token_ids="drop")
    run = collect_here(tmp_path / "run", settings, loaded=tiny_model)
    rewrite(run, 0, "tokens", lambda t: put(t, "token_id", 7))
    assert verify.verify(run).wrong == {0: ["tokens.token_id is set, but the run drops it in 1 rows"]}


def test_only_some_lines_of_a_shard_are_shown(run):
    def everything(table: pa.Table) -> pa.Table:
        for layer in range(3):
            table = put(put(table, "w0", float("nan"), router(layer)(table)), "w1", 0.0, router(layer)(table))
            table = put(put(table, "entropy", float("nan"), router(layer)(table)), "label", "xx", router(layer)(table))
        return table

    rewrite(run, 0, "routing", everything)
    lines = list(verify.verify(run).lines())
    assert len(verify.verify(run).wrong[0]) == 9
    assert lines[5:] == ["shard 0: and 4 more", "unsound: 1 of 3 committed shards are wrong"]


# ---- the run's own files ----


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: run.store.delete(RUN), "run.json is missing, although shards are committed"),
        (lambda run: run.store.put(RUN, b"{"), "run.json cannot be read: JSONDecodeError"),
        (lambda run: run.store.put(RUN, b"{}"), "run.json cannot be read: KeyError"),
        (lambda run: run.store.put(RUN, json.dumps(run.read_json(RUN) | {"plan_hash": "x"}).encode()), "to the plan x"),
        (lambda run: run.store.put(VOCAB, b"PAR1"), "vocab.parquet cannot be read"),
        (lambda run: run.store.put("plan.parquet", b"PAR1"), "plan.parquet cannot be read, and only a copy helps"),
        (lambda run: run.store.delete("commits/000001.json"), "_SUCCESS is there, although 1 shards are not committed"),
        (lambda run: run.store.put(SUCCESS, b"{}"), "_SUCCESS cannot be read, or names no manifest"),
        (
            lambda run: run.store.put(SUCCESS, json.dumps(run.read_json(SUCCESS) | {"shards": 9}).encode()),
            "_SUCCESS belongs to another plan: 9 shards",
        ),
        (lambda run: run.store.delete(MANIFEST), "_MANIFEST.parquet is missing"),
        (lambda run: run.store.put(MANIFEST, b"other"), "_MANIFEST.parquet is not the one that _SUCCESS names"),
        (
            lambda run: run.store.put(
                "commits/000001.json", run.store.read("commits/000001.json").replace(b'"node": "', b'"node": "x')
            ),
            "_MANIFEST.parquet differs from the commit records",
        ),
    ],
)
def test_a_wrong_file_of_the_run_is_named(run, damage, message):
    damage(run)
    report = verify.verify(run)
    assert not report.sound
    assert report.wrong == {}
    assert any(message in line for line in report.run), report.run


def test_a_record_of_a_shard_that_was_never_planned_is_wrong(run):
    run.store.put("commits/000009.json", run.store.read("commits/000001.json"))
    assert verify.verify(run).wrong == {9: ["the plan has no such shard"]}


# ---- collecting again ----


def test_wrong_shards_alone_are_set_aside_and_collected_again(run, original, config, tiny_model, capsys):
    kept = run.store.read("commits/000000.json")
    flip(path_of(run, 1, "routing"))
    run.store.put("commits/000002.json", b'{"shard": 2, "att')
    attempt = run.read_commit(1).attempt
    assert exit_status("verify", run.root, "--recollect") == 1
    out = capsys.readouterr().out.splitlines()
    assert out[-3] == f"set aside: replaced/000001-{attempt}.json"
    assert out[-2].startswith("set aside: replaced/000002-damaged-")
    assert out[-1] == "Run the same collect command again."
    assert run.committed_shards() == {0}
    assert not terminal.status(run)
    collect_here(Path(run.root), config, loaded=tiny_model)
    assert verify.verify(run).sound
    assert_same_content(run, original)
    assert run.store.read("commits/000000.json") == kept
    assert len(run.store.list("replaced")) == 2


def test_marks_that_lie_are_put_right_by_collecting_again(run, config, tiny_model):
    run.store.put(MANIFEST, b"other")
    assert exit_status("verify", run.root, "--recollect") == 1
    assert run.committed_shards() == {0, 1, 2}
    collect_here(Path(run.root), config, loaded=tiny_model)
    assert exit_status("verify", run.root) == 0


class Killed(BaseException):
    """Nothing may catch it."""


class DyingStore(LocalStore):
    """Carries out so many changes, and dies at the next."""

    def __init__(self, root: Path, changes: int) -> None:
        super().__init__(root)
        self.left = changes

    def _live(self) -> None:
        if self.left == 0:
            raise Killed
        self.left -= 1

    def put(self, name: str, data: bytes) -> None:
        self._live()
        super().put(name, data)

    def delete(self, name: str) -> None:
        self._live()
        super().delete(name)


@pytest.mark.parametrize("changes", range(8))
def test_recollect_may_be_killed_between_any_two_steps(run, original, config, tiny_model, changes):
    for shard in (1, 2):
        flip(path_of(run, shard, "documents"))
    dying = RunDirectory(run.root, store=DyingStore(Path(run.root), changes))
    with pytest.raises(Killed):
        verify.recollect(dying, verify.verify(dying))
    committed = run.committed_shards()
    assert {commit.shard for commit in run.commits()} == committed
    assert run.read_or_none(SUCCESS) is None or committed == {0, 1, 2}, "complete only while nothing is missing"
    verify.recollect(run, verify.verify(run))
    assert run.committed_shards() == {0}
    collect_here(Path(run.root), config, loaded=tiny_model)
    assert verify.verify(run).sound
    assert_same_content(run, original)


def test_a_damaged_record_stops_readers_and_names_the_remedy(run, capsys):
    run.reopen()
    run.store.put("commits/000001.json", b'{"shard": 1, "at')
    for command in (["status", run.root], ["sql", run.root, "select 1"], ["gc", run.root]):
        assert exit_status(*command) == 2
        said = capsys.readouterr().err
        assert "commits/000001.json is damaged" in said
        assert "`collector verify RUN --recollect` sets it aside" in said


def test_progress_is_a_line_a_minute_where_there_is_no_terminal(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    ticker = verify.Ticker()
    for done in range(1, 11):
        now[0] += 25
        ticker(done, 10)
    assert capsys.readouterr().err == "verified 3/10 shards\nverified 6/10 shards\nverified 9/10 shards\n"
