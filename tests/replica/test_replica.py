"""One replica, without Ray: what a shard's parts and commit record hold, and what they never hold."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import itertools
import json
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy.special import softmax

from collector.capture import routing_table
from collector.capture.passes import Here
from collector.capture.routing import ShardRouting
from collector.capture.shard_text import ShardText
from collector.config import DataConfig, ModelConfig
from collector.data import plan
from collector.fleet import driver
from collector.look import terminal
from collector.models import loading
from collector.pipeline import DeviceLost
from collector.replica.part_writer import PartWriter
from collector.replica.replica import IN_WORK, Replica
from collector.store.run_directory import PLAN, VOCAB, Commit, RunDirectory
from tests.helpers.runs import assert_same_content, collect_here, content, run_config, write_jsonl


@pytest.fixture
def data(tmp_path) -> DataConfig:
    return DataConfig(data=(str(write_jsonl(tmp_path / "texts.jsonl", 30)),), docs_per_shard=8)


@pytest.fixture
def config(data, tiny_folder):
    return run_config(data, ModelConfig(model=str(tiny_folder)), tokens_per_batch=256)


@contextlib.contextmanager
def replica_and_plan(root, config, loaded):
    made = plan.make_plan(config)
    with contextlib.closing(Replica(str(root), config, made.hash, loaded=loaded)) as replica:
        yield replica, made


def test_the_recorded_routing_is_that_of_each_document_alone(tmp_path, config, tiny_model):
    """Text in, Parquet out, against the model run on one document at a time."""
    run = collect_here(tmp_path / "run", config, loaded=tiny_model)
    tables = content(run)
    assert tables["documents"].num_rows == 30
    documents = {(d["shard"], d["doc"]): d for d in tables["documents"].to_pylist()}
    texts = [json.loads(line)["text"] for line in Path(config.data.data[0]).read_text().splitlines()]
    tokens, routing = tables["tokens"].to_pandas(), tables["routing"].to_pandas()
    for (shard, doc), document in documents.items():
        own = tokens[(tokens.shard == shard) & (tokens.doc == doc)]
        text = texts[shard * 8 + doc]
        assert own.token_id.tolist() == tiny_model.tokenizer(text)["input_ids"]
        assert own.position.tolist() == list(range(document["tokens"]))
        assert document["characters"] == len(text)
        with torch.no_grad():
            logits = tiny_model.model(torch.tensor([own.token_id.tolist()]), output_router_logits=True).router_logits
        for layer, layer_logits in enumerate(logits):
            rows = routing[(routing.shard == shard) & (routing.layer == layer) & routing.tok.isin(own.tok)]
            weights, experts = torch.topk(layer_logits.float().softmax(-1), 2)
            clear = rows.margin.to_numpy() > 1e-5
            np.testing.assert_array_equal(rows[["e0", "e1"]].to_numpy()[clear], experts.numpy()[clear])
            np.testing.assert_allclose(rows[["w0", "w1"]].to_numpy(), weights.numpy(), atol=1e-5)
            assert set(rows.label) == {document["label"]}
            assert rows.is_special.tolist() == [True] + [False] * (len(rows) - 1)


def test_the_commit_record_says_what_is_in_the_files(tmp_path, config, tiny_model):
    run = collect_here(tmp_path / "run", config, loaded=tiny_model)
    commits = list(run.commits())
    assert [commit.documents for commit in commits] == [8, 8, 8, 6]
    for commit in commits:
        for part in commit.files.values():
            path = tmp_path / "run" / part.path
            assert pq.read_metadata(path).num_rows == part.rows
            assert path.stat().st_size == part.bytes
        assert commit.rows == commit.tokens * 3
        assert commit.padded_tokens >= commit.tokens
        assert set(commit.seconds) == {"read", "tokenize", "idle", "forward", "place", "encode", "publish"}


def test_inside_a_file_the_rows_are_layer_major_and_in_document_order(tmp_path, config, tiny_model):
    run = collect_here(tmp_path / "run", config, loaded=tiny_model)
    for commit in run.commits():
        table = pq.read_table(tmp_path / "run" / commit.files["routing"].path)
        assert table["layer"].to_pylist() == sorted(table["layer"].to_pylist())
        assert table["tok"].to_pylist() == list(range(commit.tokens)) * 3


# ---- stages that overlap ----


def whole_run(replica, made, commits):
    """Completes a run directory whose shards were collected; returns it."""
    assert [commit.shard for commit in commits] == [shard.shard for shard in made.shards]
    driver.record_card(replica.run, made, replica.card())
    return RunDirectory(replica.run.root)


def test_shards_that_overlap_hold_what_they_hold_one_at_a_time(tmp_path, config, tiny_model):
    with replica_and_plan(tmp_path / "alone", config, tiny_model) as (replica, made):
        alone = whole_run(replica, made, [replica.collect(shard) for shard in made.shards])
    with replica_and_plan(tmp_path / "overlapping", config, tiny_model) as (replica, made):
        assert_same_content(alone, whole_run(replica, made, list(replica.collect_all(made.shards))))
    with replica_and_plan(tmp_path / "from many threads", config, tiny_model) as (replica, made):
        assert_same_content(alone, whole_run(replica, made, list(collect_each(replica, made).values())))


def several_files(folder, tiny_folder, count=5):
    """A config whose shards are a file each, and the files."""
    folder.mkdir()
    files = [write_jsonl(folder / f"{i}.jsonl", 6 + i) for i in range(count)]
    data = DataConfig(data=tuple(str(file) for file in files))
    return run_config(data, ModelConfig(model=str(tiny_folder))), files


def collect_each(replica, made):
    """Hands in all shards at once; shard -> commit or exception."""

    def attempt(shard):
        try:
            return replica.collect(shard)
        except Exception as error:  # noqa: BLE001 - the outcome that is asked for
            return error

    with ThreadPoolExecutor(len(made.shards)) as callers:
        return dict(enumerate(callers.map(attempt, made.shards)))


def a_changed_source(_replica, files, _monkeypatch):
    """Fails in the first stage."""
    files[2].write_text('{"text": "changed", "label": "en"}\n')
    return ValueError, "source changed since the plan was made"


def a_document_that_does_not_fit(replica, _files, monkeypatch):
    """Fails in the second stage: the third file's document is cut at 512 tokens, the others' are far shorter."""
    too_small(replica, monkeypatch, 511)
    return torch.OutOfMemoryError, "a single document of"


def a_token_that_makes_routers_return_nan(replica, _files, _monkeypatch):
    """Fails in the third stage, which checks before it writes."""
    embedding = replica.loaded.model.get_input_embeddings().weight
    (token,) = replica.loaded.tokenizer("\u0d9a", add_special_tokens=False)["input_ids"][-1:]
    with torch.no_grad():
        embedding[token] = torch.nan
    return ValueError, "not finite"


def a_full_disk(replica, _files, monkeypatch):
    """Fails in the third stage, with the first part published already."""
    real = replica.run.store.publish

    def publish(scratch, name):
        if "000002-" in name and "tokens" in name:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(scratch, name)

    monkeypatch.setattr(replica.run.store, "publish", publish)
    return OSError, "No space left"


@pytest.mark.parametrize(
    "harm", [a_changed_source, a_document_that_does_not_fit, a_token_that_makes_routers_return_nan, a_full_disk]
)
def test_an_exception_in_any_stage_costs_its_shard_alone(tmp_path, tiny_folder, monkeypatch, harm):
    config, files = several_files(tmp_path / "data", tiny_folder)
    longest = "\u0d9a " * 300  # a letter that no other file holds
    files[2].write_text(json.dumps({"text": longest, "label": "si"}) + "\n")
    loaded = loading.load(config.model, "cpu")
    with replica_and_plan(tmp_path / "plain", config, loaded) as (replica, made):
        plain = whole_run(replica, made, list(replica.collect_all(made.shards)))
    with replica_and_plan(tmp_path / "run", config, loaded) as (replica, made):
        kind, message = harm(replica, files, monkeypatch)
        outcomes = collect_each(replica, made)
    assert isinstance(outcomes[2], kind)
    assert message in str(outcomes[2])
    run = RunDirectory(tmp_path / "run")
    assert run.committed_shards() == {0, 1, 3, 4}
    (tmp_path / "plain" / "commits" / "000002.json").unlink()
    assert_same_content(plain, run)


def test_no_more_than_three_shards_are_in_memory_however_slow_the_writer_is(tmp_path, config, tiny_model, monkeypatch):
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, docs_per_shard=3))
    real_read, real_write, held = plan.read_shard, PartWriter.write, []

    def in_memory():
        return sum(type(thing) is ShardText for thing in gc.get_objects())

    def read(shard, data):
        held.append(in_memory())
        return real_read(shard, data)

    def write(self, *args):
        time.sleep(0.1)
        return real_write(self, *args)

    monkeypatch.setattr(plan, "read_shard", read)
    monkeypatch.setattr(PartWriter, "write", write)
    with replica_and_plan(tmp_path / "run", config, tiny_model) as (replica, made):
        before = in_memory()
        commits = list(replica.collect_all(made.shards))
    assert len(commits) == len(held) == 10
    assert max(held) - before <= IN_WORK - 1, "beside the one that is about to be read"


def test_the_time_that_the_device_waited_is_recorded(tmp_path, config, tiny_model):
    """Shards that do not overlap: the device waits for everything that is not its own."""
    with replica_and_plan(tmp_path / "run", config, tiny_model) as (replica, made):
        started = time.perf_counter()
        seconds = [replica.collect(shard).seconds for shard in made.shards]
        wall = time.perf_counter() - started
    assert seconds[0]["idle"] >= seconds[0]["read"] + seconds[0]["tokenize"] - 1e-3
    for before, this in itertools.pairwise(seconds):
        others = before["encode"] + before["publish"] + this["read"] + this["tokenize"]
        assert this["idle"] >= others - 1e-3
    assert sum(each["idle"] + each["forward"] for each in seconds) <= wall + 1e-3


def test_the_device_stage_computes_with_the_threads_it_was_given(tmp_path, config, tiny_model, monkeypatch):
    before, seen = torch.get_num_threads(), []
    made = plan.make_plan(config)
    with contextlib.closing(Replica(str(tmp_path), config, made.hash, loaded=tiny_model, threads=1)) as replica:
        real = replica.capture.run
        thread_counted = lambda *a, **k: seen.append(torch.get_num_threads()) or real(*a, **k)  # noqa: E731
        monkeypatch.setattr(replica.capture, "run", thread_counted)
        torch.set_num_threads(3)  # of whoever uses torch beside the replica
        try:
            replica.collect(made.shards[0])
        finally:
            torch.set_num_threads(before)
    assert set(seen) == {1}


def test_a_replica_whose_device_failed_says_so(tmp_path, config, tiny_model, monkeypatch):
    """As after a device-side assert: CUDA answers every later call with the same error."""

    def failed(*_, **__):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    with replica_and_plan(tmp_path / "run", config, tiny_model) as (replica, made):
        monkeypatch.setattr(replica.capture, "run", failed)
        outcomes = collect_each(replica, made)
    for error in outcomes.values():
        assert type(pickle.loads(pickle.dumps(error))) is DeviceLost
        assert "device-side assert" in str(error)
    assert RunDirectory(tmp_path / "run").committed_shards() == set()


def test_close_ends_threads_and_hooks_and_may_be_repeated(tmp_path, config, tiny_model):
    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny_model.model.modules())

    threads, hooked = threading.active_count(), hooks()
    with replica_and_plan(tmp_path / "run", config, tiny_model) as (replica, made):
        list(replica.collect_all(made.shards))
        names = {thread.name.partition("_")[0] for thread in threading.enumerate()}
        assert names >= {"read", "device", "write"}
        assert hooks() > hooked
        replica.close()
        assert threading.active_count() == threads
        assert hooks() == hooked
        with pytest.raises(RuntimeError, match="shutdown"):
            replica.collect(made.shards[0])


def test_repeating_a_shard_repeats_its_content(tmp_path, config, tiny_model):
    first = collect_here(tmp_path / "first", config, loaded=tiny_model)
    second = collect_here(tmp_path / "second", config, loaded=tiny_model)
    assert_same_content(first, second)


def test_results_that_another_thread_puts_in_place_are_the_same(tmp_path, config, tiny_model):
    """As beside a GPU."""
    first = collect_here(tmp_path / "first", config, loaded=tiny_model)
    with (
        ThreadPoolExecutor(1) as thread,
        replica_and_plan(tmp_path / "second", config, tiny_model) as (replica, made),
    ):
        replica._passes = dataclasses.replace(replica._passes, placer=thread)
        list(replica.collect_all(made.shards))
    assert_same_content(first, RunDirectory(tmp_path / "second"))


@pytest.mark.parametrize("placer", [Here, lambda: ThreadPoolExecutor(1)])
def test_a_result_that_has_no_place_fails_its_shard_alone(tmp_path, config, tiny_model, monkeypatch, placer):
    put, calls = ShardRouting.put, []

    def failing(self, batch, kept):
        calls.append(batch)
        if len(calls) == 1:
            raise ValueError("no place for it")
        put(self, batch, kept)

    monkeypatch.setattr(ShardRouting, "put", failing)
    with replica_and_plan(tmp_path / "run", config, tiny_model) as (replica, made):
        replica._passes = dataclasses.replace(replica._passes, placer=placer())
        with pytest.raises(ValueError, match="no place for it"):
            replica.collect(made.shards[0])
        commits = [replica.collect(shard) for shard in made.shards]
    assert {commit.shard for commit in commits} == {shard.shard for shard in made.shards}


def test_bad_rows_are_counted_by_reason_with_examples_and_cost_nothing_else(tmp_path, tiny_folder, tiny_model):
    path = tmp_path / "bad.jsonl"
    path.write_text(
        '{"text": "fine", "label": "en"}\n{"text": "", "label": "en"}\nnot json\n{"text": "ok", "label": "en"}\n'
    )
    config = run_config(DataConfig(data=(str(path),)), ModelConfig(model=str(tiny_folder)))
    (commit,) = collect_here(tmp_path / "run", config, loaded=tiny_model).commits()
    assert commit.documents == 2
    assert {reason: (s.count, s.examples) for reason, s in commit.skipped.items()} == {
        "empty text": (1, ("bad.jsonl#1",)),
        "invalid JSON": (1, ("bad.jsonl#2",)),
    }


def test_a_shard_of_bad_rows_only_is_committed_empty(tmp_path, tiny_folder, tiny_model):
    path = tmp_path / "bad.jsonl"
    path.write_text("nothing\nhere\n")
    config = run_config(DataConfig(data=(str(path),)), ModelConfig(model=str(tiny_folder)))
    run = collect_here(tmp_path / "run", config, loaded=tiny_model)
    (commit,) = run.commits()
    assert (commit.documents, commit.tokens, commit.rows) == (0, 0, 0)
    assert all(table.num_rows == 0 for table in content(run).values())


def test_long_documents_are_cut_and_counted(tmp_path, data, tiny_folder, tiny_model):
    config = run_config(data, ModelConfig(model=str(tiny_folder)), max_length=10)
    run = collect_here(tmp_path / "run", config, loaded=tiny_model)
    documents = content(run)["documents"].to_pylist()
    assert max(d["tokens"] for d in documents) == 10
    assert sum(d["truncated"] for d in documents) == sum(commit.truncated for commit in run.commits()) > 0


def test_text_is_stored_only_when_asked_for(tmp_path, data, tiny_folder, tiny_model):
    model = ModelConfig(model=str(tiny_folder))
    plain = collect_here(tmp_path / "plain", run_config(data, model), loaded=tiny_model)
    asked = collect_here(tmp_path / "asked", run_config(data, model, store=("text",)), loaded=tiny_model)
    assert "text" not in content(plain)["documents"].column_names
    first = json.loads(Path(data.data[0]).read_text().splitlines()[0])["text"]
    assert content(asked)["documents"]["text"][0].as_py() == first


def test_probabilities_and_logits_are_stored_when_asked_for(tmp_path, data, tiny_folder, tiny_model):
    config = run_config(data, ModelConfig(model=str(tiny_folder)), store=("probabilities", "logits"))
    routing = content(collect_here(tmp_path / "run", config, loaded=tiny_model))["routing"].to_pandas()
    p = np.stack(routing.probabilities)
    assert p.shape[1] == 6
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(softmax(np.stack(routing.logits), axis=1), p, atol=1e-6)
    chosen = np.take_along_axis(p, routing[["e0", "e1"]].to_numpy().astype(int), 1)
    np.testing.assert_allclose(chosen, routing[["w0", "w1"]].to_numpy(), atol=1e-6)


def test_a_router_that_returns_nan_fails_the_shard_and_leaves_no_file(tmp_path, config, tiny_folder):
    broken = loading.load(ModelConfig(model=str(tiny_folder)), "cpu")
    with torch.no_grad():
        broken.model.layers[1].mlp.gate.weight[0, 0] = torch.nan
    with (
        replica_and_plan(tmp_path / "run", config, broken) as (replica, made),
        pytest.raises(ValueError, match=r"layer 1: .*not finite"),
    ):
        replica.collect(made.shards[0])
    assert list(RunDirectory(tmp_path / "run").commits()) == []
    assert not (tmp_path / "run" / "data").exists()


def too_small(replica, monkeypatch, positions):
    """Makes a replica's device fail for batches of more padded tokens; returns the sizes that it was asked for."""
    real, asked = replica.capture.run, []

    def run(ids, mask, **slots):
        asked.append(tuple(ids.shape))
        if ids.numel() > positions:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return real(ids, mask, **slots)

    monkeypatch.setattr(replica.capture, "run", run)
    return asked


def test_a_batch_beyond_the_devices_memory_is_halved_until_it_fits(tmp_path, config, tiny_model, monkeypatch, capsys):
    plain = collect_here(tmp_path / "plain", config, loaded=tiny_model)
    assert {commit.halved for commit in plain.commits()} == {0}
    config = dataclasses.replace(config, capture=dataclasses.replace(config.capture, tokens_per_batch=2048))
    with replica_and_plan(tmp_path / "run", config, tiny_model) as (replica, made):
        asked = too_small(replica, monkeypatch, 200)
        commits = [replica.collect(shard) for shard in made.shards]
        driver.record_card(replica.run, made, replica.card())
        replica.run.store.put_new(PLAN, made.to_parquet())
    fitting = [rows * width for rows, width in asked if rows * width <= 200]
    assert sum(commit.halved for commit in commits) == len(asked) - len(fitting) > len(commits)
    assert sum(commit.batches for commit in commits) == len(fitting)
    assert sum(commit.padded_tokens for commit in commits) == sum(fitting)
    a, b = content(plain), content(RunDirectory(tmp_path / "run"))
    for name in ("tokens", "documents"):
        assert a[name].to_pydict() == b[name].to_pydict()
    a, b = a["routing"].to_pandas(), b["routing"].to_pandas()
    clear = a.margin > 1e-5
    exact = ["shard", "layer", "tok", "label", "e0", "e1"]
    assert a.loc[clear, exact].equals(b.loc[clear, exact])
    np.testing.assert_allclose(a[["w0", "w1"]], b[["w0", "w1"]], atol=1e-6)
    terminal.status(RunDirectory(tmp_path / "run"))
    terminal.status(plain)
    said = capsys.readouterr().out
    assert said.count(f"{len(asked) - len(fitting)} batches did not fit and were halved") == said.count("halved") == 1


def test_a_single_document_beyond_the_devices_memory_names_its_length_and_the_remedy(
    tmp_path, config, tiny_model, monkeypatch
):
    with replica_and_plan(tmp_path / "run", config, tiny_model) as (replica, made):
        asked = too_small(replica, monkeypatch, 20)
        message = r"a single document of \d+ tokens .*--max-length \(now 512\).*--tokens-per-batch.*Tried to"
        with pytest.raises(torch.OutOfMemoryError, match=message):
            replica.collect(made.shards[0])
    assert asked[-1][0] == 1
    assert asked[-1][1] > 20
    assert RunDirectory(tmp_path / "run").committed_shards() == set()


def test_a_commit_record_from_before_batches_could_be_halved_is_read(tmp_path, config, tiny_model):
    run = collect_here(tmp_path / "run", config, loaded=tiny_model)
    record = json.loads(run.store.read("commits/000000.json"))
    assert record.pop("halved") == 0
    assert Commit.from_json(json.dumps(record).encode()) == run.read_commit(0)


def test_an_exception_while_writing_publishes_nothing(tmp_path, config, tiny_model, monkeypatch):
    """A Parquet writer closed by an exception leaves a valid file that lacks rows."""
    real = routing_table.rows

    def fail_at_layer_1(shard, layer, *args, **kwargs):
        if layer.geometry.layer == 1:
            raise OSError("no space left on device")
        return real(shard, layer, *args, **kwargs)

    monkeypatch.setattr(routing_table, "rows", fail_at_layer_1)
    with replica_and_plan(tmp_path / "run", config, tiny_model) as (replica, made):
        with pytest.raises(OSError, match="no space"):
            replica.collect(made.shards[0])
        assert [p for p in (tmp_path / "run").rglob("*") if p.is_file()] == []
        monkeypatch.undo()
        replica.collect(made.shards[0])
    assert RunDirectory(tmp_path / "run").committed_shards() == {0}


def test_a_maximum_length_beyond_the_models_positions_is_refused(tmp_path, data, tiny_folder):
    config = run_config(data, ModelConfig(model=str(tiny_folder)), max_length=1000)
    with pytest.raises(ValueError, match="--max-length 1000 exceeds the model's 512 positions"):
        Replica(str(tmp_path / "run"), config, "hash")


def test_the_card_names_model_routers_and_versions(tmp_path, config, tiny_model):
    run = collect_here(tmp_path / "run", config, loaded=tiny_model)
    card = run.read_json("run.json")
    assert card["model"]["model_type"] == "olmoe"
    assert card["model"]["parameters"] == sum(p.numel() for p in tiny_model.model.parameters())
    assert [(one["stack"], one["layer"], one["n_experts"], one["top_k"]) for one in card["layers"]] == [
        ("decoder", 0, 6, 2), ("decoder", 1, 6, 2), ("decoder", 2, 6, 2),
    ]  # fmt: skip
    assert card["stacks"] == ["decoder"]
    assert not any(one["has_capacity"] for one in card["layers"])
    assert card["layers"][2]["router"] == "layers.2.mlp.gate"
    assert {"torch", "transformers", "tokenizers", "bitsandbytes"} <= card["versions"].keys()
    assert pq.read_table(tmp_path / "run" / VOCAB).num_rows == 8192
    assert (tmp_path / "run" / "_SUCCESS").exists()
