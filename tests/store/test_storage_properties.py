"""Whatever writers do, and wherever they die, a run ends with every shard exactly once.

A state machine drives any number of writers step by step: scratch file, part, commit. Each may stop for good between
any two steps, meet a store that refuses, and one that does what it was asked and then fails to say so. Content is a
function of the shard alone, as it is for replicas, so whoever wins the commit is right.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
from pathlib import Path

import obstore
import obstore.store
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from collector.store.run_directory import (
    MANIFEST,
    PLAN,
    SUCCESS,
    Commit,
    LocalStore,
    ObjectStore,
    Part,
    RunDirectory,
)
from collector.upkeep import orphans

TABLES = ("routing", "tokens", "documents")
SHARDS = 2


class LostError(Exception):
    """The store did not answer."""


class FaultyStore:
    """Passes everything on to a store, but fails the next change as it is told: before it is made, or after."""

    def __init__(self, store) -> None:
        self.store = store
        self.fault: str | None = None

    def __getattr__(self, name: str):
        return getattr(self.store, name)

    def _change(self, name: str, *arguments):
        fault, self.fault = self.fault, None
        if fault == "before":
            raise LostError
        result = getattr(self.store, name)(*arguments)
        if fault == "after":
            raise LostError
        return result

    def put_new(self, name: str, data: bytes) -> bool:
        return self._change("put_new", name, data)

    def put(self, name: str, data: bytes) -> None:
        self._change("put", name, data)

    def publish(self, scratch: Path, name: str) -> None:
        self._change("publish", scratch, name)

    def delete(self, name: str) -> None:
        self._change("delete", name)


def content(shard: int, table: str) -> bytes:
    return f"{table} of shard {shard}".encode()


@dataclasses.dataclass
class Writer:
    """An attempt at a shard, and how far it is."""

    shard: int
    attempt: str
    scratch: Path
    parts: dict[str, Part] = dataclasses.field(default_factory=dict)

    def publish(self, run: RunDirectory, table: str) -> None:
        path = self.scratch / table
        path.write_bytes(content(self.shard, table))
        self.parts[table] = run.publish_part(path, self.shard, self.attempt, table, rows=1)

    def commit(self, run: RunDirectory) -> Commit:
        record = Commit(
            shard=self.shard, attempt=self.attempt, plan_hash="p", files=dict(self.parts), documents=1, tokens=1,
            rows=1, characters=1, truncated=0, skipped={}, batches=1, padded_tokens=1, seconds={}, node="here",
        )  # fmt: skip
        return run.commit(record)


class Writers(RuleBasedStateMachine):
    """Writers that share a run; `store` of the subclasses makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="writers-"))
        self.faulty = FaultyStore(self.store())
        self.run = RunDirectory(self.folder / "run", store=self.faulty)
        self.writers: list[Writer] = []
        self.begun = 0
        self.won: dict[int, str] = {}
        """Shard -> attempt that was seen to be committed."""

    def store(self):
        raise NotImplementedError

    def files(self) -> set[str]:
        """Everything that the store holds, hidden or not; folders of scratch files too."""
        raise NotImplementedError

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @initialize()
    def plan(self) -> None:
        self.run.store.put_new(PLAN, b"a plan")

    def begin(self, shard: int) -> Writer:
        self.begun += 1
        parent = self.run.store.scratch_parent() or self.folder
        scratch = Path(tempfile.mkdtemp(prefix="attempt-", dir=parent))
        return Writer(shard, f"attempt{self.begun}", scratch)

    def settle(self, commit: Commit) -> None:
        assert self.won.setdefault(commit.shard, commit.attempt) == commit.attempt, "two attempts won"

    @rule(shards=st.lists(st.integers(0, SHARDS - 1), min_size=1, max_size=3), parts=st.integers(0, len(TABLES)))
    def writers_begin(self, shards: list[int], parts: int) -> None:
        """Some at once, as when a shard is given to another replica and the first lives on; each with so many parts."""
        for shard in shards:
            self.writers.append(self.begin(shard))
            for table in TABLES[:parts]:
                self.writers[-1].publish(self.run, table)

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), steps=st.integers(1, 4), fault=st.sampled_from([None, None, "before", "after"]))
    def a_writer_goes_on(self, data, steps: int, fault) -> None:
        """Some steps; a writer whose step fails is gone, as a replica is whose shard failed."""
        writer = data.draw(st.sampled_from(self.writers))
        for step in range(steps):
            self.faulty.fault = fault if step == steps - 1 else None
            missing = [table for table in TABLES if table not in writer.parts]
            try:
                if missing:
                    writer.publish(self.run, missing[0])
                    continue
                self.settle(writer.commit(self.run))
            except LostError:
                pass
            self.writers.remove(writer)
            break
        self.faulty.fault = None

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def a_writer_is_killed(self, data) -> None:
        """Its scratch folder and its parts stay behind."""
        self.writers.remove(data.draw(st.sampled_from(self.writers)))

    @rule(fault=st.sampled_from([None, "before", "after"]), shard=st.integers(0, SHARDS - 1))
    def a_failure_is_noted(self, fault, shard: int) -> None:
        self.faulty.fault = fault
        with contextlib.suppress(LostError):
            self.run.record_failure(shard, {"error": "x"})
        self.faulty.fault = None

    @rule(fault=st.sampled_from([None, "before", "after"]))
    def a_driver_finishes_if_it_may(self, fault) -> None:
        if self.run.committed_shards() == set(range(SHARDS)):
            self.faulty.fault = fault
            with contextlib.suppress(LostError):
                self.run.finish("p", SHARDS)
            self.faulty.fault = None

    @precondition(lambda self: self.run.committed_shards())
    @rule(data=st.data(), killed_after=st.integers(0, 6))
    def a_shard_is_set_aside(self, data, killed_after: int) -> None:
        """The steps of `verify --recollect`, up to a death between any two."""
        shard = data.draw(st.sampled_from(sorted(self.run.committed_shards())))
        data_of = self.run.store.read(f"commits/{shard:06d}.json")
        steps = [
            lambda: self.run.store.delete(SUCCESS),
            lambda: self.run.store.delete(MANIFEST),
            lambda: self.run.store.put(f"replaced/{shard:06d}-{self.won[shard]}.json", data_of),
            lambda: self.run.store.delete(f"commits/{shard:06d}.json"),
        ]
        if killed_after >= len(steps):
            self.run.reopen()
            self.run.set_aside(shard)
        else:
            for step in steps[:killed_after]:
                step()
        if shard not in self.run.committed_shards():
            del self.won[shard]

    # ---- at every moment ----

    @invariant()
    def what_is_committed_is_whole_and_right(self) -> None:
        for commit in self.run.commits():
            self.settle(commit)
            assert set(commit.files) == set(TABLES)
            for table, part in commit.files.items():
                assert self.run.store.read(part.path) == content(commit.shard, table)

    @invariant()
    def records_and_manifest_agree(self) -> None:
        records = list(self.run.records())
        assert list(self.run.commits()) == records
        assert [each.shard for each in records] == sorted(self.run.committed_shards())

    @invariant()
    def complete_means_complete(self) -> None:
        if self.run.read_or_none(SUCCESS) is not None:
            assert self.run.committed_shards() == set(range(SHARDS))

    @invariant()
    def nothing_half_written_has_a_name(self) -> None:
        for folder in ("data", "commits", "failures", "replaced"):
            for name in self.run.store.list(folder):
                assert self.run.store.read(name).strip(), name

    # ---- in the end ----

    def complete_and_tidy(self) -> None:
        for shard in set(range(SHARDS)) - self.run.committed_shards():
            writer = self.begin(shard)
            for table in TABLES:
                writer.publish(self.run, table)
            self.settle(writer.commit(self.run))
            shutil.rmtree(writer.scratch)
        self.run.finish("p", SHARDS)
        assert [commit.shard for commit in self.run.commits()] == list(range(SHARDS))
        committed = {part.path for commit in self.run.records() for part in commit.files.values()}
        kept = {name for name in self.files() if not name.startswith((".", "data/"))} | committed
        gone = self.files() - kept
        found = orphans.find(self.run, 0)
        assert {entry.name for entry in found if entry.name.startswith("data/")} == {n for n in gone if "data/" in n}
        orphans.remove(self.run, found)
        assert self.files() == kept

    @precondition(lambda self: self.begun > 5)
    @rule()
    def the_run_is_resumed_to_its_end(self) -> None:
        """A fresh writer does what is missing, and gc removes exactly what counts for nothing.

        What still lives is killed first: gc with age 0 is for runs that nothing writes to.
        """
        self.writers.clear()
        self.complete_and_tidy()


class LocalWriters(Writers):
    def store(self):
        return LocalStore(self.folder / "run")

    def files(self) -> set[str]:
        root = self.folder / "run"
        return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() or "attempt-" in path.name}


class ObjectWriters(Writers):
    def store(self):
        return ObjectStore("memory://run", obstore.store.MemoryStore())

    def files(self) -> set[str]:
        return {each["path"] for page in obstore.list(self.faulty.store.store) for each in page}


STEPS = settings(max_examples=50, stateful_step_count=30, deadline=None, derandomize=True)
TestLocalWriters = LocalWriters.TestCase
TestLocalWriters.settings = STEPS
TestObjectWriters = ObjectWriters.TestCase
TestObjectWriters.settings = STEPS
