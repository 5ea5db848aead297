"""Who gets which shard, and who is blamed: every course of events, played by a fleet in this process.

The fleet's replicas commit for real, into a run directory; what they die of is told to them beforehand.
"""

from __future__ import annotations

import dataclasses
import io
import tracemalloc
from collections import Counter, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from collector.config import LaunchConfig
from collector.data.plan import Plan, Shard
from collector.fleet import dispatch
from collector.fleet.dispatch import Dispatcher, Job
from collector.fleet.events import Collected, Died, Failed, Loaded, NotLoaded
from collector.fleet.progress import ProgressView, Tally
from collector.fleet.worklist import State, Worklist
from collector.pipeline import IN_WORK
from collector.store.run_directory import Commit, LocalStore, RunDirectory, Skipped

CARD = {"memory": {"summary": "a toy"}}


class ToyFleet:
    """Replicas that finish their oldest shard whenever they are waited for; what goes wrong is given."""

    def __init__(self, run: RunDirectory, replicas: int, *, deadly: tuple[int, ...] = (), bad: tuple[int, ...] = (),
                 dies_after_commit: tuple[int, ...] = (), slow_loading: int = 0,
                 useless: tuple[int, ...] = ()) -> None:  # fmt: skip
        self.run = run
        self.useless = set(useless)
        self.replicas = replicas
        self.deadly, self.bad, self.dies_after_commit = set(deadly), set(bad), set(dies_after_commit)
        self.loading: dict[int, int] = {}
        self.work: dict[int, deque[Shard]] = {}
        self.started = 0
        self.slow_loading = slow_loading
        self.assigned: list[tuple[int, int]] = []
        self.released: list[int] = []
        self.together: dict[int, list[set[int]]] = {}
        """Shard -> what was in work beside it, each time it ran."""

    def scale(self, waiting):
        unready = len(self.loading)
        for _ in range(min(self.replicas - unready - len(self.work), waiting - unready)):
            # The first one is quick, so that there is one at work while others load.
            self.loading[self.started] = self.slow_loading if self.started else 0
            self.started += 1

    def wait(self, timeout):
        assert timeout > 0
        for replica, left in list(self.loading.items()):
            self.loading[replica] -= 1
            if left <= 0:
                del self.loading[replica]
                yield self.load(replica)
        for replica, shards in list(self.work.items()):
            if shards:
                yield self.step(replica, shards)

    def load(self, replica):
        self.work[replica] = deque()
        return Loaded(replica=replica, card=CARD)

    def step(self, replica, shards):
        number = shards[0].shard
        assert len(shards) <= IN_WORK
        self.together.setdefault(number, []).append({shard.shard for shard in shards} - {number})
        if number in self.deadly:
            return self.die(replica)
        shards.popleft()
        if number in self.bad:
            return Failed(replica=replica, shard=number, error=ValueError("unreadable"), trace="the traceback")
        record = rejected(number) if number in self.useless else commit(number)
        assert self.run.commit(record) == record, "committed twice"
        if number in self.dies_after_commit:
            self.work[replica].appendleft(shards.popleft() if shards else None)
            return self.die(replica)
        return Collected(replica=replica, shard=number, commit=record)

    def die(self, replica):
        del self.work[replica]
        return Died(replica=replica, error=RuntimeError("out of memory"), trace="the worker died")

    def assign(self, replica, shard):
        self.work[replica].append(shard)
        self.assigned.append((replica, shard.shard))

    def release(self, replica):
        assert not self.work.pop(replica)
        self.released.append(replica)

    def node(self, replica):
        return f"node{replica}"

    def count(self, state):
        return {"loading": len(self.loading), "ready": len(self.work)}.get(state, 0)

    def stop(self):
        self.work.clear()


def commit(number: int) -> Commit:
    return Commit(shard=number, attempt=f"a{number}", plan_hash="p", files={}, documents=2, tokens=10, rows=20,
                  characters=30, truncated=0, skipped={}, batches=1, padded_tokens=12, seconds={"forward": 0.5},
                  node="n")  # fmt: skip


def rejected(number: int) -> Commit:
    skipped = {"no label": Skipped(count=2, examples=("s#0",))}
    return dataclasses.replace(commit(number), documents=0, tokens=0, rows=0, padded_tokens=0, skipped=skipped)


def plan_of(shards: int) -> Plan:
    return Plan(config={}, shards=tuple(
        Shard(shard=number, source="s", name="s", kind="text", first_row=2 * number, rows=2, offset=None, keep=None,
              fingerprint="f") for number in range(shards)))  # fmt: skip


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def dispatcher_of(run, fleet, shards, **settings) -> Dispatcher:
    view = ProgressView(Tally(shards=shards, documents=2 * shards), Console(file=io.StringIO(), width=300))
    return Dispatcher(Job(run=run, plan=plan_of(shards), launch=LaunchConfig(**settings)), fleet, view)


def said(dispatcher: Dispatcher) -> str:
    return dispatcher.view.console.file.getvalue()


# ---- who gets what ----


def test_every_shard_is_handed_out_once_and_replicas_end_with_the_work(run):
    fleet = ToyFleet(run, 3)
    dispatcher_of(run, fleet, 40).dispatch()
    assert sorted(shard for _, shard in fleet.assigned) == list(range(40))
    assert run.committed_shards() == set(range(40))
    assert sorted(fleet.released) == [0, 1, 2]


def test_with_few_shards_every_replica_gets_one(run):
    fleet = ToyFleet(run, 4)
    dispatcher_of(run, fleet, 4).dispatch()
    assert sorted(replica for replica, _ in fleet.assigned) == [0, 1, 2, 3]


def test_with_many_shards_every_replica_has_several_in_work(run):
    fleet = ToyFleet(run, 2)
    dispatcher_of(run, fleet, 30).dispatch()
    assert [replica for replica, _ in fleet.assigned[: 2 * IN_WORK]] == [0, 1] * IN_WORK, "in rounds"
    assert max(len(beside) for each in fleet.together.values() for beside in each) == IN_WORK - 1


def test_work_begins_with_the_first_replica_and_leaves_a_shard_for_each_that_still_loads(run):
    fleet = ToyFleet(run, 3, slow_loading=2)
    dispatcher_of(run, fleet, 5).dispatch()
    by_replica = Counter(replica for replica, _ in fleet.assigned)
    assert by_replica.keys() == {0, 1, 2}
    assert fleet.assigned[0] == (0, 0)


def test_no_more_replicas_are_asked_for_than_there_are_shards(run):
    fleet = ToyFleet(run, 100)
    dispatcher_of(run, fleet, 3).dispatch()
    assert fleet.started == 3


# ---- who is blamed ----


def test_an_error_counts_at_once_and_the_replica_goes_on(run):
    fleet = ToyFleet(run, 1, bad=(2,))
    dispatcher = dispatcher_of(run, fleet, 6)
    dispatcher.dispatch()
    assert fleet.started == 1
    assert Counter(shard for _, shard in fleet.assigned) == Counter([*range(6), 2, 2])
    assert run.committed_shards() == {0, 1, 3, 4, 5}
    failure = run.failures().pop(2)
    assert failure | {"time": ""} == {
        "shard": 2, "source": "s", "first_row": 4, "rows": 2, "attempts": 3, "left_out": True, "time": "",
        "error": "ValueError: unreadable", "traceback": "the traceback", "node": "node0",
    }  # fmt: skip
    for attempt, outcome in ((1, "to be tried again"), (2, "to be tried again"), (3, "left out")):
        assert f"shard 2 failed on node0 (attempt {attempt} of 3), {outcome}: ValueError: unreadable" in said(
            dispatcher
        )
    assert dispatcher.view.tally.shards_failed == 1


def test_of_several_shards_in_a_dead_replica_none_is_blamed_until_it_kills_alone(run):
    fleet = ToyFleet(run, 1, deadly=(1,))
    dispatcher = dispatcher_of(run, fleet, 12)
    dispatcher.dispatch()
    assert run.committed_shards() == set(range(12)) - {1}
    assert {shard: failure["attempts"] for shard, failure in run.failures().items()} == {1: 3}
    first, *alone = fleet.together[1]
    assert len(first) == IN_WORK - 1
    assert alone == [set()] * 3, "afterwards nothing runs beside it"
    for innocent in first:
        assert fleet.together[innocent] == [set()], "it had not run yet; then it runs alone"
    assert "a replica on node0 died, shards 1, 2, 3, 4 of it are tried one at a time: out of memory" in said(dispatcher)
    assert fleet.started == 1 + 1 + 3, "each death is followed by a new replica"


def test_other_replicas_go_on_while_a_suspect_runs_alone(run):
    fleet = ToyFleet(run, 3, deadly=(0,))
    dispatcher_of(run, fleet, 60).dispatch()
    assert run.committed_shards() == set(range(1, 60))
    assert all(not beside for beside in fleet.together[0][1:])
    assert Counter(shard for _, shard in fleet.assigned)[0] == 4


def test_a_shard_committed_just_before_its_replica_died_is_not_repeated(run):
    fleet = ToyFleet(run, 1, dies_after_commit=(0, 4))
    dispatcher = dispatcher_of(run, fleet, 8)
    dispatcher.dispatch()
    assert run.committed_shards() == set(range(8))
    assert run.failures() == {}
    assert dispatcher.view.tally.shards_done == 8


# ---- rows that become no document ----


def test_a_run_ends_as_soon_as_it_must_reject_too_many_rows_and_a_higher_share_goes_on(run):
    fleet = ToyFleet(run, 1, useless=tuple(range(40)))
    with pytest.raises(ValueError, match=r"of 80 rows were rejected, more than --max-rejected 0\.25 allows") as refusal:
        dispatcher_of(run, fleet, 40, max_rejected=0.25).dispatch()
    assert "no label (--label-column names the column, @file or @folder takes it from the path)" in str(refusal.value)
    assert "with --max-rejected 1 the same command accepts these and goes on" in str(refusal.value)
    assert run.committed_shards() == set(range(11)), "the first that make more than a quarter"

    idle = ToyFleet(run, 1)
    with pytest.raises(ValueError, match="22 of 80 rows were rejected"):
        dispatcher_of(run, idle, 40, max_rejected=0.25).dispatch()
    assert idle.started == 0, "no replica is started for nothing"

    others = ToyFleet(run, 1, useless=tuple(range(40)))
    dispatcher_of(run, others, 40, max_rejected=1).dispatch()
    assert run.committed_shards() == set(range(40))


def test_useless_rows_at_the_start_end_nothing_while_the_others_may_be_good(run):
    dispatcher_of(run, ToyFleet(run, 1, useless=tuple(range(10))), 40, max_rejected=0.25).dispatch()
    assert run.committed_shards() == set(range(40))


# ---- who only looks on ----


def test_an_observer_that_fails_is_told_once_and_ends_nothing(run):
    dispatcher = dispatcher_of(run, ToyFleet(run, 1), 40)

    def observe(_):
        "é".encode("ascii")

    dispatcher.observe = observe
    dispatcher.dispatch()
    assert run.committed_shards() == set(range(40))
    assert said(dispatcher).count("metrics fail, and the run goes on without them (UnicodeEncodeError: ") == 1


# ---- from launch to launch ----


def test_attempts_are_counted_over_launches(run):
    for launch in (1, 2):
        fleet = ToyFleet(run, 1, bad=(0,))
        dispatcher = dispatcher_of(run, fleet, 2, max_attempts=5)
        assert dispatcher.failures.attempts.get(0, 0) == 2 * (launch - 1)
        # A launch that is ended after two attempts.
        dispatcher.observe = interrupt_after(run, 2 * launch)
        with pytest.raises(KeyboardInterrupt):
            dispatcher.dispatch()
    fleet = ToyFleet(run, 1, bad=(0,))
    dispatcher_of(run, fleet, 2, max_attempts=5).dispatch()
    assert fleet.assigned == [(0, 0)], "the fifth"
    assert run.failures()[0]["attempts"] == 5


def interrupt_after(run, attempts):
    def observe(_):
        if run.failures().get(0, {}).get("attempts") == attempts:
            raise KeyboardInterrupt

    return observe


def test_what_was_left_out_stays_out_and_is_told_again(run):
    dispatcher_of(run, ToyFleet(run, 1, bad=(0,)), 3).dispatch()
    fleet = ToyFleet(run, 1)
    dispatcher = dispatcher_of(run, fleet, 3)
    dispatcher.dispatch()
    assert fleet.assigned == []
    assert fleet.started == 0, "and no replica is started for nothing"
    assert "shard 0 failed 3 times before and stays out (--retry-failed tries it again): ValueError" in said(dispatcher)
    assert dispatcher.view.tally.shards_failed == 1


def test_with_retry_failed_it_gets_as_many_attempts_again(run):
    dispatcher_of(run, ToyFleet(run, 1, bad=(0,)), 3).dispatch()
    fleet = ToyFleet(run, 1, bad=(0,))
    dispatcher = dispatcher_of(run, fleet, 3, retry_failed=True)
    dispatcher.dispatch()
    assert fleet.assigned == [(0, 0)] * 3
    assert run.failures()[0]["attempts"] == 6
    assert "(attempt 4 of 6), to be tried again" in said(dispatcher)
    dispatcher = dispatcher_of(run, ToyFleet(run, 1), 3, retry_failed=True)
    dispatcher.dispatch()
    assert run.failures() == {}
    assert run.committed_shards() == {0, 1, 2}


def test_a_failure_of_a_shard_that_was_committed_after_all_is_forgotten(run):
    run.record_failure(0, {"attempts": 3, "left_out": True, "error": "e"})
    run.commit(commit(0))
    dispatcher = dispatcher_of(run, ToyFleet(run, 1), 2)
    assert run.failures() == {}
    assert "stays out" not in said(dispatcher)


# ---- replicas that do not load ----


class NeverLoads(ToyFleet):
    def __init__(self, *arguments, refused=False, good=0, **settings):
        super().__init__(*arguments, **settings)
        self.refused, self.good = refused, good

    def load(self, replica):
        if replica < self.good:
            return super().load(replica)
        return NotLoaded(replica=replica, error=ValueError("cannot load"), refused=self.refused)


def test_a_model_that_refuses_ends_the_run_with_its_reason(run):
    fleet = NeverLoads(run, 4, refused=True)
    with pytest.raises(ValueError, match="cannot load"):
        dispatcher_of(run, fleet, 9).dispatch()
    assert fleet.assigned == []


def test_replicas_that_die_while_loading_are_tried_as_often_as_a_shard(run):
    fleet = NeverLoads(run, 1)
    with pytest.raises(RuntimeError, match=r"3 replicas in a row could not load the model.*cannot load"):
        dispatcher_of(run, fleet, 9).dispatch()
    assert fleet.started == 3


def test_one_good_replica_does_the_work_of_those_that_cannot_load(run):
    fleet = NeverLoads(run, 3, good=1)
    dispatcher_of(run, fleet, 9).dispatch()
    assert run.committed_shards() == set(range(9))


# ---- other drivers ----


class CountingStore(LocalStore):
    def __init__(self, root):
        super().__init__(root)
        self.reads = Counter()

    def read(self, name):
        self.reads[name] += 1
        return super().read(name)


def test_no_commit_record_is_asked_for_where_no_other_driver_begins(tmp_path):
    run = RunDirectory(tmp_path / "run", CountingStore(tmp_path / "run"))
    dispatcher_of(run, ToyFleet(run, 2), 30).dispatch()
    assert not any(name.startswith("commits/") for name in run.store.reads)


def test_a_part_looks_before_it_helps_with_the_shards_of_others(tmp_path):
    run = RunDirectory(tmp_path / "run", CountingStore(tmp_path / "run"))
    fleet = ToyFleet(run, 1)
    dispatcher = dispatcher_of(run, fleet, 30, part="2/3")
    for number in range(0, 30, 3):  # another driver's, after this one looked at the run
        run.commit(commit(number))
    dispatcher.dispatch()
    assert [shard for _, shard in fleet.assigned[:10]] == list(range(1, 30, 3))
    assert {shard for _, shard in fleet.assigned} == set(range(30)) - set(range(0, 30, 3))
    assert dispatcher.view.tally.shards_done == 30
    assert not any(f"commits/{number:06d}.json" in run.store.reads for number in range(1, 30, 3))


def test_commits_of_others_are_seen_by_listing_them(run, monkeypatch):
    monkeypatch.setattr(dispatch, "LISTING_SECONDS", 0.0)
    monkeypatch.setattr(dispatch, "LISTING_SHARE", 0)
    fleet = ToyFleet(run, 1)
    dispatcher = dispatcher_of(run, fleet, 300)
    for number in range(200, 300):
        run.commit(commit(number))
    while dispatcher.work.count(State.COMMITTED) < 100:
        dispatcher._take_out_what_others_did()
    dispatcher.dispatch()
    assert {shard for _, shard in fleet.assigned} == set(range(200))
    tally = dispatcher.view.tally
    assert (tally.shards_done, tally.rows_done, tally.launch_rows) == (300, 600, 400)


def test_who_finds_another_driver_at_the_own_shards_leaves_its_order_and_looks_before_each(tmp_path, monkeypatch):
    monkeypatch.setattr(dispatch, "LISTING_SECONDS", 0.0)
    monkeypatch.setattr(dispatch, "LISTING_SHARE", 10**9)  # one listing and no other
    run = RunDirectory(tmp_path / "run", CountingStore(tmp_path / "run"))
    fleet = ToyFleet(run, 1)
    dispatcher = dispatcher_of(run, fleet, 300)
    run.commit(commit(0))
    while not dispatcher.has_company:
        dispatcher._take_out_what_others_did()
    for number in range(200, 300):  # seen by no listing
        run.commit(commit(number))
    dispatcher.dispatch()
    order = [shard for _, shard in fleet.assigned]
    assert sorted(order) == list(range(1, 200))
    assert order != sorted(order)
    assert all(run.store.reads[f"commits/{number:06d}.json"] for number in range(1, 300))


# ---- whatever happens ----


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_shard_ends_committed_or_left_out_after_its_attempts_and_no_innocent_is_left_out(tmp_path_factory, data):
    shards = data.draw(st.integers(1, 40))
    some = st.sets(st.integers(0, shards - 1), max_size=4)
    deadly, bad, mortal = data.draw(some), data.draw(some), data.draw(some)
    attempts = data.draw(st.integers(1, 3))
    run = RunDirectory(tmp_path_factory.mktemp("any"))
    fleet = ToyFleet(run, data.draw(st.integers(1, 5)), deadly=deadly, bad=bad, dies_after_commit=mortal,
                     slow_loading=data.draw(st.integers(0, 3)))  # fmt: skip
    dispatcher = dispatcher_of(run, fleet, shards, max_attempts=attempts)
    dispatcher.dispatch()
    guilty = deadly | bad
    assert run.committed_shards() == set(range(shards)) - guilty
    assert {shard: failure["attempts"] for shard, failure in run.failures().items()} == dict.fromkeys(guilty, attempts)
    assert dispatcher.work.count(State.WAITING) == dispatcher.work.count(State.WORKING) == 0
    assert not fleet.work, "every replica was released"


def test_a_million_shards_take_a_few_bytes_each():
    tracemalloc.start()
    work = Worklist(1_000_000, committed=range(0, 1_000_000, 2), share=(1, 4))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert work.waiting == 500_000
    assert held < 8e6
    assert work.take() == 1
