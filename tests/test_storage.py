"""The commit protocol: a name appears whole, one writer wins, and only commit records count."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import obstore.store
import pytest

from collector.storage import Commit, LocalStore, ObjectStore, RunDirectory, Skipped


@pytest.fixture(params=["local", "memory", "obstore-local"])
def run(request, tmp_path) -> RunDirectory:
    stores = {
        "local": lambda: LocalStore(tmp_path / "run"),
        "memory": lambda: ObjectStore("memory://run", obstore.store.MemoryStore()),
        "obstore-local": lambda: ObjectStore("file://run", obstore.store.LocalStore(tmp_path / "run", mkdir=True)),
    }
    return RunDirectory(tmp_path / "run", store=stores[request.param]())


def attempt(run: RunDirectory, shard: int, name: str, content: bytes = b"rows") -> Commit:
    """Publishes one part and returns the record that would commit it."""
    with run.scratch() as scratch:
        from pathlib import Path

        path = Path(scratch) / "routing"
        path.write_bytes(content)
        part = run.publish_part(path, shard, name, "routing", rows=1)
    return Commit(shard=shard, attempt=name, plan_hash="p", files={"routing": part}, documents=1, tokens=1, rows=1,
                  characters=3, truncated=0, skipped={"no text": Skipped(count=1, examples=("a#1",))}, batches=1,
                  padded_tokens=1, seconds={"forward": 0.5}, node="here")  # fmt: skip


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
