"""The commit protocol: a name appears whole, one writer wins, and only commit records count."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import obstore.store
import pytest

from collector.store.run_directory import (
    Commit,
    DamagedRecordError,
    LocalStore,
    ObjectStore,
    RunDirectory,
    StoreError,
)
from tests.helpers.runs import attempt


@pytest.fixture(params=["local", "memory", "obstore-local"])
def run(request, tmp_path) -> RunDirectory:
    stores = {
        "local": lambda: LocalStore(tmp_path / "run"),
        "memory": lambda: ObjectStore("memory://run", obstore.store.MemoryStore()),
        "obstore-local": lambda: ObjectStore("file://run", obstore.store.LocalStore(tmp_path / "run", mkdir=True)),
    }
    return RunDirectory(tmp_path / "run", store=stores[request.param]())


def test_a_record_survives_its_own_json(run):
    record = attempt(run, 3, "a")
    assert Commit.from_json(record.to_json()) == record


def test_a_published_part_counts_only_once_committed(run):
    record = attempt(run, 0, "a")
    assert list(run.commits()) == []
    assert run.committed_shards() == set()
    assert run.commit(record) == record
    assert list(run.commits()) == [record]
    assert run.committed_shards() == {0}
    assert run.store.read(record.files["routing"].path) == b"rows"


def test_the_second_attempt_loses_and_removes_its_own_parts_only(run):
    first, second = attempt(run, 0, "first"), attempt(run, 0, "second")
    run.commit(first)
    assert run.commit(second) == first
    assert run.store.list("data") == [first.files["routing"].path]


def test_of_many_writers_at_once_exactly_one_wins(run):
    records = [attempt(run, 0, f"attempt{i}") for i in range(8)]
    barrier = threading.Barrier(8)

    def commit(record):
        barrier.wait()
        return run.commit(record).attempt

    with ThreadPoolExecutor(8) as pool:
        winners = set(pool.map(commit, records))
    assert len(winners) == 1
    (record,) = run.commits()
    assert {record.attempt} == winners
    assert run.store.list("data") == [record.files["routing"].path]


def test_an_answer_that_gets_lost_after_the_write_is_no_failure(run, monkeypatch):
    record = attempt(run, 0, "a")
    put_new = run.store.put_new

    def write_then_time_out(name, data):
        put_new(name, data)
        raise TimeoutError("no answer")

    monkeypatch.setattr(run.store, "put_new", write_then_time_out)
    assert run.commit(record) == record
    assert run.store.read(record.files["routing"].path) == b"rows", "its parts stay"


def test_a_write_that_never_happened_is_a_failure(run, monkeypatch):
    def refuse(_name, _data):
        raise TimeoutError("no answer")

    monkeypatch.setattr(run.store, "put_new", refuse)
    with pytest.raises(TimeoutError):
        run.commit(attempt(run, 0, "a"))
    assert run.committed_shards() == set()


def test_put_new_never_replaces_and_put_does(run):
    assert run.store.put_new("x/a.json", b"1")
    assert not run.store.put_new("x/a.json", b"2")
    assert run.store.read("x/a.json") == b"1"
    run.store.put("x/a.json", b"3")
    assert run.store.read("x/a.json") == b"3"
    assert run.store.list("x") == ["x/a.json"], "nothing is left beside it"


def test_what_is_not_there(run):
    assert run.read_or_none("run.json") is None
    assert run.store.list("commits") == []
    with pytest.raises(FileNotFoundError):
        run.read_json("run.json")
    run.store.delete("run.json")
    assert run.read_commit(5) is None


def test_failures_are_kept_until_the_shard_succeeds(run):
    run.record_failure(4, {"error": "first"})
    run.record_failure(4, {"error": "second"})
    assert run.failures() == {4: {"error": "second"}}
    run.clear_failure(4)
    run.clear_failure(4)
    assert run.failures() == {}


def test_rejected_rows_have_a_folder_of_their_own(run, tmp_path):
    (tmp_path / "scratch").write_bytes(b"rows")
    assert run.publish_part(tmp_path / "scratch", 7, "a", "rejects", 2).path == "rejects/000007-a.rejects.parquet"


def test_entries_tell_size_and_time(run):
    before = time.time()
    run.store.put("x/a.json", b"123")
    run.store.put("x/b.json", b"")
    assert [(each.name, each.size) for each in run.store.entries("x")] == [("x/a.json", 3), ("x/b.json", 0)]
    assert all(before - 2 <= each.modified <= time.time() + 2 for each in run.store.entries("x"))
    assert list(run.store.entries("nothing")) == []


def test_a_local_copy_has_the_content(run, tmp_path):
    run.store.put("x/a", b"123")
    assert run.store.local_copy("x/a", tmp_path).read_bytes() == b"123"
    with pytest.raises(FileNotFoundError):
        run.store.local_copy("x/b", tmp_path)


# ---- many records, and damaged ones ----


def test_records_are_read_by_shard_whatever_order_names_have(run):
    for shard in (1_000_000, 3, 20):
        run.commit(attempt(run, shard, "a"))
    run.store.put("commits/notes.txt", b"mine")
    assert [commit.shard for commit in run.commits()] == [3, 20, 1_000_000]
    assert run.committed_shards() == {3, 20, 1_000_000}


def test_records_of_an_unfinished_run_are_read_many_at_once(run, monkeypatch):
    for shard in range(40):
        run.commit(attempt(run, shard, "a"))
    read, together = run.store.read, threading.Barrier(8)

    def read_in_company(name: str) -> bytes:
        if name.startswith("commits/"):
            together.wait(timeout=20)  # breaks unless eight are here at once
        return read(name)

    monkeypatch.setattr(run.store, "read", read_in_company)
    assert [commit.shard for commit in run.commits()] == list(range(40))


def test_a_record_that_goes_while_records_are_read_is_none(run, monkeypatch):
    for shard in range(3):
        run.commit(attempt(run, shard, "a"))
    names = run.store.list("commits")
    run.set_aside(1)
    monkeypatch.setattr(run.store, "list", lambda _prefix: names)
    assert [commit.shard for commit in run.commits()] == [0, 2]


@pytest.mark.parametrize("keep", [0, 1, 30, -3])
def test_a_half_written_record_is_an_error_that_tells_the_remedy(run, keep):
    record = attempt(run, 3, "a")
    run.store.put("commits/000003.json", record.to_json()[:keep])
    readers = [lambda: run.read_commit(3), lambda: list(run.commits()), lambda: run.commit(attempt(run, 3, "b"))]
    for read in readers:
        with pytest.raises(
            DamagedRecordError, match=r"commits/000003.json is damaged.*collector verify RUN --recollect"
        ):
            read()
    assert run.committed_shards() == {3}
    aside = run.set_aside(3)
    assert aside.startswith("replaced/000003-damaged-")
    assert run.store.read(aside) == record.to_json()[:keep]
    assert run.commit(record) == record


@pytest.mark.parametrize("data", [b"{}", b"[]", b"null", b'"x"', b"\xff", b'{"files": 3, "skipped": {}}'])
def test_a_record_of_another_make_is_a_damaged_one(data):
    with pytest.raises(DamagedRecordError):
        Commit.from_json(data)


def test_setting_a_record_aside_twice_keeps_it(run):
    record = attempt(run, 3, "a")
    run.commit(record)
    assert run.set_aside(3) == "replaced/000003-a.json"
    run.commit(record)
    assert run.set_aside(3) == "replaced/000003-a.json"
    assert Commit.from_json(run.store.read("replaced/000003-a.json")) == record
    assert run.committed_shards() == set()


# ---- no room ----


@pytest.fixture
def local(tmp_path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


@contextlib.contextmanager
def no_room():
    """Within: files of this process end at 100 bytes, as on a disk that is full; those of pytest itself, too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def everything(run: RunDirectory) -> set[str]:
    return {str(path.relative_to(run.root)) for path in Path(run.root).rglob("*") if path.is_file()}


def test_a_full_disk_leaves_nothing_half_written(local):
    local.store.put("failures/000001.json", b"old")
    for change in (local.store.put, local.store.put_new):
        with pytest.raises(OSError, match=r"nothing of it was kept; free some space") as caught, no_room():
            change("failures/000001.json", bytes(1000))
        assert caught.value.errno == errno.EFBIG
        assert "failures/000001.json" in str(caught.value)
    assert everything(local) == {"failures/000001.json"}
    assert local.store.read("failures/000001.json") == b"old"


def test_a_full_disk_at_a_commit_costs_no_commit(local):
    record = attempt(local, 0, "a")
    with pytest.raises(OSError, match="free some space"), no_room():
        local.commit(record)
    assert local.committed_shards() == set()
    assert everything(local) == {record.files["routing"].path}


def test_a_disk_that_is_full_only_when_it_syncs_leaves_nothing(local, monkeypatch, tmp_path):
    """Network file systems and quotas may take a write and refuse it when it is to be durable."""

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "scratch").write_bytes(b"rows")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: nothing of it was kept") as caught:
        local.store.put_new("commits/000000.json", b"{}")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="free some space"):
        local.publish_part(tmp_path / "scratch", 0, "a", "routing", rows=1)
    assert everything(local) == set()


def test_a_file_system_without_links_is_named(local, monkeypatch):
    def refuse(*_arguments) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OSError, match="a commit needs hard links; put the run on a file system that has them"):
        local.store.put_new("commits/000000.json", b"{}")
    assert everything(local) == set()


def test_errors_of_a_store_come_back_from_other_processes():
    error = pickle.loads(pickle.dumps(StoreError("s3://runs/one: no")))
    assert (type(error), str(error)) == (StoreError, "s3://runs/one: no")
