"""A run on an object store does what a local one does: collected, queried in place, verified, tidied, and explained.

The store is moto's S3, which answers over HTTP as S3 does; in front of it stands a switch that refuses requests, or
loses the answers to requests that were carried out.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import duckdb
import fsspec
import numpy as np
import obstore.fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from collector import open_runs, open_sweep
from collector.config import DataConfig, ModelConfig
from collector.query.rollup import files
from collector.query.warehouse import open_run
from collector.store import object_store
from collector.store.remote_files import BLOCK, BlockCache, RangeFile, RunFiles
from collector.store.run_directory import ObjectStore, RunDirectory, StoreError
from collector.upkeep import verify
from tests.helpers.command_line import exit_status
from tests.helpers.query_runs import assert_same, assert_same_rows, keyed
from tests.helpers.runs import attempt, collect_here, run_config, write_jsonl
from tests.helpers.sweeps import sweep_here, write_checkpoints

BUCKET = "runs"
pytestmark = pytest.mark.usefixtures("s3")
QUERIES = [("effective_experts", {}), ("domain_specialization", {"layer": 1}), ("top_experts", {"n": 2})]


def _never(_method: str, _url: str) -> bool:
    return False


class Switch:
    """WSGI application in front of the store: passes requests on, refuses them, or loses their answers."""

    def __init__(self, app) -> None:
        self.app = app
        self.seen: list[tuple[str, str, str]] = []
        self.refuse = self.lose = _never

    def __call__(self, environ, start_response):
        method, url = environ["REQUEST_METHOD"], environ["PATH_INFO"] + "?" + environ.get("QUERY_STRING", "")
        self.seen.append((method, url, environ.get("HTTP_RANGE", "")))
        if self.refuse(method, url):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("503 Service Unavailable", [("Content-Length", "0")])
            return [b""]
        if self.lose(method, url):
            for _ in self.app(environ, lambda *_: lambda _: None):
                pass
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return [b""]
        return self.app(environ, start_response)

    def reset(self) -> None:
        self.seen.clear()
        self.refuse = self.lose = _never


def first(count: int, method: str, part: str = ""):
    """True for the first so many requests with this method and this in their URL."""
    left = [count]

    def matches(found: str, url: str) -> bool:
        hit = found == method and part in url and left[0] > 0
        left[0] -= hit
        return hit

    return matches


@pytest.fixture(scope="module")
def server():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    switch = Switch(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, switch, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    switch.url = f"http://127.0.0.1:{server.server_port}"
    yield switch
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def s3(server):
    """A client of the store that everything in this module finds by its environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": server.url, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        client = boto3.client("s3", endpoint_url=server.url)
        client.create_bucket(Bucket=BUCKET)
        yield client


@pytest.fixture(autouse=True)
def _everything_passes(server):
    yield
    server.reset()


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_folder):
    texts = write_jsonl(tmp_path_factory.mktemp("remote") / "texts.jsonl", 20)
    texts.write_text(texts.read_text() + '{"text": ""}\n')
    data = DataConfig(data=(str(texts),), docs_per_shard=8)
    return run_config(data, ModelConfig(model=str(tiny_folder)))


@pytest.fixture(scope="module")
def run(s3, config, tiny_model) -> RunDirectory:  # noqa: ARG001  # where the URL leads
    return collect_here(f"s3://{BUCKET}/deep/run", config, loaded=tiny_model)


@pytest.fixture(scope="module")
def local(tmp_path_factory, config, tiny_model) -> RunDirectory:
    return collect_here(tmp_path_factory.mktemp("local") / "run", config, loaded=tiny_model)


def download(s3, prefix: str, folder: Path) -> Path:
    for each in s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix)["Contents"]:
        path = folder / each["Key"].removeprefix(prefix)
        path.parent.mkdir(parents=True, exist_ok=True)
        s3.download_file(BUCKET, each["Key"], str(path))
    return folder


# ---- the same as a local run ----


@pytest.mark.parametrize(("name", "params"), QUERIES)
def test_a_remote_run_answers_as_a_local_one(run, local, name, params):
    remote, here = (open_run(each.root).query(name, **params).fetchall() for each in (run, local))
    assert_same_rows(remote, here)


def test_runs_compare_wherever_they_are(run, local):
    for here, there in ((run.root, local.root), (local.root, run.root), (run.root, run.root)):
        pair = open_runs(here, there)
        assert {row[4] for row in pair.query("router_saturation").fetchall()} == {1}
        alone = open_run(there).query("effective_experts").fetchall()
        assert_same_rows(pair.other.query("effective_experts").fetchall(), alone)


def test_every_value_arrives(run, local):
    for table in ("routing", "tokens", "documents", "rejects", "vocab"):
        rows = f"select * from {table} order by all"
        assert open_run(run.root).sql(rows).fetchall() == open_run(local.root).sql(rows).fetchall(), table


def test_the_script_of_views_serves_any_duckdb_that_reads_the_store(run, local, capsys):
    """Which is DuckDB with its extension httpfs, or, as here, with a file system of fsspec."""
    assert exit_status("views", run.root) == 0
    obstore.fsspec.register("s3")
    connection = duckdb.connect()
    connection.register_filesystem(fsspec.filesystem("s3"))
    connection.execute(capsys.readouterr().out)
    rows = "from assignments order by all"
    assert_same_rows(connection.execute(rows).fetchall(), open_run(local.root).sql(rows).fetchall())


def test_status_verify_and_gc_take_the_url(run, capsys):
    assert exit_status("status", run.root) == 0
    assert "complete" in capsys.readouterr().out
    assert exit_status("verify", run.root) == 0
    assert capsys.readouterr().out == "sound: all of 3 committed shards are correct\n"
    assert exit_status("gc", run.root) == 0
    assert capsys.readouterr().out == "removed: 0 orphans, 0 bytes\n"
    assert exit_status("query", run.root, "router_entropy", "--format", "csv") == 0
    assert exit_status("sql", run.root, "select count(*) from documents", "--format", "json") == 0
    assert '[{"count_star()": 20}]' in capsys.readouterr().out


def test_its_views_work_once_it_is_copied(run, s3, tmp_path):
    folder = download(s3, "deep/run/", tmp_path / "copy")
    program = (
        "import duckdb, pathlib; c = duckdb.connect(); c.execute(pathlib.Path('views.sql').read_text());"
        "print(c.sql('select count(*) from routing').fetchall())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == str(open_run(run.root).sql("select count(*) from routing").fetchall())
    assert verify.verify(RunDirectory(folder)).sound


def test_a_finished_run_is_opened_without_its_commit_records(run, server):
    server.seen.clear()
    open_run(run.root)
    assert not [url for _, url, _ in server.seen if "commits" in url]


def test_a_query_fetches_the_columns_that_it_reads(tmp_path, server):
    """Of a file of 5 MB, one column of one row group in six."""
    rng = np.random.default_rng(0)
    wide = {f"c{i}": rng.random(100_000) for i in range(6)}
    pq.write_table(pa.table(wide), tmp_path / "wide.parquet", row_group_size=20_000, compression="none")
    store = ObjectStore(f"s3://{BUCKET}/wide")
    size = (tmp_path / "wide.parquet").stat().st_size
    shutil.copy(tmp_path / "wide.parquet", tmp_path / "scratch")
    store.publish(tmp_path / "scratch", "wide.parquet")
    server.seen.clear()
    connection = duckdb.connect()
    connection.register_filesystem(RunFiles(store, {"wide.parquet": size}))
    total = connection.sql("select sum(c3) from read_parquet('run://wide.parquet')").fetchall()[0][0]
    assert total == pytest.approx(wide["c3"].sum())
    ranges = [tuple(map(int, header.removeprefix("bytes=").split("-"))) for _, _, header in server.seen if header]
    assert len(ranges) == len(server.seen)
    fetched = sum(end + 1 - start for start, end in ranges)
    assert fetched < size / 3
    connection.sql("select avg(c3) from read_parquet('run://wide.parquet')").fetchall()
    assert len(server.seen) == len(ranges), "the second query finds its blocks in memory"
    connection.unregister_filesystem("run")


def test_threads_share_an_open_file():
    store = ObjectStore(f"s3://{BUCKET}/shared")
    content = np.random.default_rng(1).bytes(5 * BLOCK + 123)
    store.put("file", content)
    file = RangeFile(BlockCache(store, {"file": len(content)}, capacity=3), "file")

    def read(seed: int) -> bool:
        rng = np.random.default_rng(seed)
        right = True
        for _ in range(50):
            start, count = int(rng.integers(0, len(content) + 10)), int(rng.integers(0, 2 * BLOCK))
            file.seek(start)
            right &= file.read(count) == content[start : start + count]
        return right

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))
    assert file.seek(-5, 2) == len(content) - 5
    assert file.read() == content[-5:]


@pytest.mark.parametrize(
    "statement",
    [
        "select * from read_text('/etc/passwd')",
        "from read_text('run://run.json')",
        "from glob('run://*')",
        "from read_parquet('s3://runs/deep/run/plan.parquet')",
        "copy (select 1) to 'run://vocab.parquet' (format parquet, use_tmp_file false)",
        "copy (select 1) to 'run://new.parquet'",
        "install httpfs",
        "attach 'run://x.db'",
        "set lock_configuration = false",
    ],
)
def test_a_remote_run_is_as_locked_as_a_local_one(run, s3, statement):
    def objects():
        return {each["Key"]: each["ETag"] for each in s3.list_objects_v2(Bucket=BUCKET)["Contents"]}

    before = objects()
    with pytest.raises(duckdb.Error):
        open_run(run.root).connection.execute(statement).fetchall()
    assert objects() == before


def test_a_rollup_lies_beside_a_remote_run_and_is_read_in_place(config, tiny_model, local, server, capsys):
    root = f"s3://{BUCKET}/counted"
    run = collect_here(root, config, loaded=tiny_model)
    assert exit_status("rollup", root) == 0
    assert ": 3 shards, " in capsys.readouterr().out
    names = set(files.current(run).values())
    assert set(run.store.list("rollup")) == names
    for by, name, keys in (("label", "domain_specialization", 5), ("length", "load_balance", 4)):
        counted, expected = open_run(root, by=by), open_run(local.root, by=by)
        server.seen.clear()
        assert_same(keyed(counted, name, keys), keyed(expected, name, keys))
        assert not [url for _, url, _ in server.seen if ".routing.parquet" in url], "nothing is counted again"
    assert exit_status("verify", root) == 0
    assert capsys.readouterr().out.endswith("correct, and so is the rollup\n")
    run.reopen()
    run.set_aside(1)
    assert files.current(run) == {}
    assert exit_status("gc", root, "--older-than", "0", "--dry-run") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in names)


# ---- damage and orphans ----


def test_a_damaged_part_is_named_set_aside_and_collected_again(config, tiny_model, local, capsys):
    root = f"s3://{BUCKET}/damaged"
    run = collect_here(root, config, loaded=tiny_model)
    part = run.read_commit(1).files["tokens"]
    data = bytearray(run.store.read(part.path))
    data[len(data) // 2] ^= 1
    run.store.put(part.path, bytes(data))
    assert exit_status("verify", root) == 1
    assert capsys.readouterr().out.splitlines()[0] == f"shard 1: {part.path} has another SHA-256 than was committed"
    assert exit_status("verify", root, "--recollect") == 1
    assert run.committed_shards() == {0, 2}
    collect_here(root, config, loaded=tiny_model)
    assert verify.verify(run).sound
    rows = "select * from routing order by all"
    assert open_run(root).sql(rows).fetchall() == open_run(local.root).sql(rows).fetchall()
    capsys.readouterr()
    assert exit_status("gc", root) == 0
    assert "removed: 0 orphans" in capsys.readouterr().out, "they are young"
    assert exit_status("gc", root, "--older-than", "0") == 0
    assert "removed: 3 orphans" in capsys.readouterr().out
    assert verify.verify(run).sound


# ---- what a store does wrong ----


@pytest.fixture
def two_retries(monkeypatch):
    monkeypatch.setitem(object_store._RETRIES, "max_retries", 2)


def test_passing_errors_are_retried(server, tmp_path):
    run = RunDirectory(f"s3://{BUCKET}/flaky")
    record = attempt(run, 0, "a")
    server.refuse = first(2, "PUT")
    assert run.commit(record) == record
    server.refuse = first(2, "GET")
    assert list(run.commits()) == [record]
    server.refuse = first(2, "PUT")
    (tmp_path / "scratch").write_bytes(b"rows")
    assert run.publish_part(tmp_path / "scratch", 1, "a", "routing", 1).bytes == 4


def test_a_lost_answer_to_a_commit_is_a_commit(server):
    """The retry then meets the record that the first request wrote: it is this attempt's own."""
    run = RunDirectory(f"s3://{BUCKET}/lost")
    record = attempt(run, 0, "a")
    server.lose = first(1, "PUT", "commits")
    assert run.commit(record) == record
    assert Counter(method for method, url, _ in server.seen if "commits" in url)["PUT"] == 2
    assert run.store.read(record.files["routing"].path) == b"rows", "its parts stay"


@pytest.mark.usefixtures("two_retries")
def test_a_store_that_stays_away_costs_no_commit(server):
    run = RunDirectory(f"s3://{BUCKET}/away")
    record = attempt(run, 0, "a")
    server.refuse = first(1000, "PUT", "commits")
    with pytest.raises(StoreError, match=r"s3://runs/away/commits/000000.json: the store does not answer"):
        run.commit(record)
    server.reset()
    assert run.committed_shards() == set()
    assert run.commit(record) == record


@pytest.mark.usefixtures("two_retries")
def test_an_upload_in_parts_that_fails_is_aborted(s3, server, tmp_path):
    run = RunDirectory(f"s3://{BUCKET}/parts")
    (tmp_path / "scratch").write_bytes(bytes(12 * 2**20))
    server.refuse = first(1000, "PUT", "partNumber=2")
    with pytest.raises(StoreError, match="the store does not answer"):
        run.publish_part(tmp_path / "scratch", 0, "a", "routing", 1)
    assert run.store.list("data") == []
    assert "Uploads" not in s3.list_multipart_uploads(Bucket=BUCKET)
    server.reset()
    part = run.publish_part(tmp_path / "scratch", 0, "a", "routing", 1)
    assert [(e.name, e.size) for e in run.store.entries("data")] == [(part.path, 12 * 2**20)]


@pytest.mark.usefixtures("two_retries")
@pytest.mark.parametrize(
    ("root", "settings", "message"),
    [
        ("s3://no-such-bucket/run", {}, "s3://no-such-bucket/run/sweep.json: the bucket does not exist: create it"),
        ("s3://runs/run", {"AWS_ALLOW_HTTP": "false"}, "the endpoint is plain http: set AWS_ALLOW_HTTP=true"),
        ("s3://runs/run", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "s3://runs/run/sweep.json: the store does not"),
        ("s3://runs/nothing", {}, "no run in s3://runs/nothing"),
        ("foo://runs/run", {}, "take a local path, s3://BUCKET/PATH"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_store_is_told_in_one_line(monkeypatch, capsys, root, settings, message):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert exit_status("status", root) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.usefixtures("two_retries")
def test_a_store_that_stays_away_ends_a_query_in_one_line(run, server, capsys):
    server.refuse = first(1000, "GET", ".routing.parquet")
    assert exit_status("query", run.root, "router_entropy") == 2
    said = capsys.readouterr().err
    assert "the store does not answer" in said
    assert said.count("\n") == 1


@pytest.mark.usefixtures("two_retries")
def test_a_bucket_that_vanishes_is_no_missing_file():
    store = ObjectStore("s3://no-such-bucket/run")
    for operation in (
        lambda: store.read("run.json"), lambda: store.put("a", b""), lambda: store.put_new("a", b""),
        lambda: store.list("commits"), lambda: store.delete("a"), lambda: store.read_ranges("a", [(0, 1)]),
    ):  # fmt: skip
        with pytest.raises(StoreError, match="the bucket does not exist"):
            operation()


def test_the_manifest_of_a_remote_run_is_its_records(run):
    assert [dataclasses.asdict(each) for each in run.commits()] == [dataclasses.asdict(each) for each in run.records()]


def test_a_sweep_on_an_object_store_is_collected_and_asked_in_place(tmp_path):
    model = write_checkpoints(tmp_path / "trained", ["step1", "step2"])
    texts, url = write_jsonl(tmp_path / "texts.jsonl", 8), f"s3://{BUCKET}/sweep"
    remote, local = sweep_here(url, model, texts), sweep_here(tmp_path / "sweep", model, texts)
    assert all(map(remote.is_complete, remote.checkpoints()))
    answers = [
        open_sweep(each.root).query("router_saturation", layer=1).project("checkpoint, label, value").fetchall()
        for each in (remote, local)
    ]
    assert answers[0] == answers[1] != []
    assert open_sweep(url).last.root == f"{url}/step2"
