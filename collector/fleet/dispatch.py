"""Hands shards to replicas, and decides what happens to a shard that fails.

Pure logic over a `Fleet`, without Ray, so that a test can play through any course of events. Guarantees:

- A free replica gets a shard before another gets its second one; a replica has up to `IN_WORK` in
  work, so that reading, computing and writing of different shards overlap.
- An error that a shard raises counts as an attempt. When a replica dies with several shards in work,
  nobody knows which one killed it. None is blamed; each is tried again alone, and only a death
  alone counts.
- Attempts are counted over all launches. After `max_attempts` a shard is left out and stays out,
  until a launch with `retry_failed` gives it as many again.

All state that matters is in the run directory. So the dispatcher may be killed at any moment and the run resumed, and
two drivers on one run only waste work. It lists the commit records from time to time to see shards that others
committed. A driver that finds another one working on its own share shuffles what is left, and looks for a commit before
it hands out a shard.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
from typing import TYPE_CHECKING, Any

from collector.fleet.events import Collected, Died, Failed, Loaded, Notice, NotLoaded
from collector.fleet.failures import Failures
from collector.fleet.harmless import Harmless
from collector.fleet.rejected import complaint
from collector.fleet.worklist import Worklist
from collector.pipeline import IN_WORK

if TYPE_CHECKING:
    from collections.abc import Callable

    from collector.config import LaunchConfig
    from collector.data.plan import Plan
    from collector.fleet.events import Event, Fleet
    from collector.fleet.progress import ProgressView
    from collector.store.run_directory import Commit, RunDirectory

WAIT_SECONDS = 0.5
LISTING_SECONDS = 10.0
LISTING_SHARE = 20
"""Between two listings passes at least this many times the duration of the last one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A run that is being collected."""

    run: RunDirectory
    plan: Plan
    launch: LaunchConfig
    """Attempts per shard, and which shards this driver begins with."""


class Dispatcher:
    """Hands shards to replicas until none is left to hand out."""

    def __init__(
        self, job: Job, fleet: Fleet, view: ProgressView, *,
        accept_card: Callable[[dict[str, Any]], None] = lambda _: None,
        observe: Callable[[Dispatcher], None] = lambda _: None,
    ) -> None:  # fmt: skip
        """Reads what is committed and what failed, and counts what is committed.

        Args:
            job: the run.
            fleet: the replicas.
            view: where messages and progress go.
            accept_card: takes each new replica's card; a ValueError of it ends the run.
            observe: called after every round; an error of it is told once, and does not end the run.
        """
        self.run = job.run
        self.plan = job.plan
        self.fleet = fleet
        self.view = view
        self.max_attempts = job.launch.max_attempts
        self.max_rejected = job.launch.max_rejected
        self.accept_card = accept_card
        self.observe = observe
        self.observing = Harmless("metrics", functools.partial(view.say, event="metrics_failed"))
        committed = self._count_committed()
        self.failures = Failures(job.run, self.max_attempts, committed=committed, retry_failed=job.launch.retry_failed)
        self._tell_left_out()
        self.work = Worklist(
            len(job.plan.shards), committed=committed, failed=self.failures.left_out, share=job.launch.share()
        )
        self.in_work: dict[int, set[int]] = {}
        self.alone: set[int] = set()
        self.loaded_one = False
        self.load_failures = 0
        self.last_load_failure = ""
        self.ready_seconds = 0.0
        self.busy_seconds = 0.0
        self.has_company = False
        self._listing = _Listing(job.run)

    def dispatch(self) -> None:
        """Returns when every shard is committed or has failed its last attempt.

        Raises:
            ValueError: the model cannot be loaded, a replica loaded another than the run began with, or too many rows
                are rejected.
            RuntimeError: no replica is left, and none can be loaded any more.
        """
        before = time.monotonic()
        while self.work.unfinished:
            self._stop_if_in_vain()
            self._scale()
            for event in self.fleet.wait(WAIT_SECONDS):
                self._handle(event)
            now = time.monotonic()
            self.ready_seconds += (now - before) * len(self.in_work)
            before = now
            self._take_out_what_others_did()
            self._assign()
            self._release_idle()
            with self.observing:
                self.observe(self)
            self.view.tick()

    def _stop_if_in_vain(self) -> None:
        """Ends a run of which too many rows are rejected already, whatever becomes of the others."""
        if said := complaint(self.view.tally.rejected, self.view.tally.documents, self.max_rejected):
            raise ValueError(said)

    @property
    def idle_share(self) -> float:
        """Share of the ready replicas' time in which the model did not run."""
        return max(0.0, 1 - self.busy_seconds / self.ready_seconds) if self.ready_seconds else 0.0

    def _scale(self) -> None:
        """Asks for replicas, unless none is left and the last ones could not load."""
        if self.in_work or self.load_failures < self.max_attempts:
            self.fleet.scale(self.work.waiting)
        elif not self.fleet.count("loading"):
            raise RuntimeError(self.last_load_failure)

    # -- what happened -----------------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        match event:
            case Loaded():
                self._loaded(event)
            case NotLoaded():
                self._not_loaded(event)
            case Collected():
                self._taken_off(event.replica, event.shard)
                self._done(event.shard, event.commit)
            case Failed():
                self._taken_off(event.replica, event.shard)
                self._failed(event.shard, event, suspect=False)
            case Died():
                self._died(event)
            case Notice():
                self.view.say(event.message, event=event.event)

    def _loaded(self, event: Loaded) -> None:
        self.accept_card(event.card)
        self.load_failures = 0
        self.in_work[event.replica] = set()
        if not self.loaded_one:  # rates and ETA count from here
            self.loaded_one = True
            self.view.say(f"replica: {event.card['memory']['summary']}", event="replica_ready")
            self.view.note = ""
            self.view.tally.started = time.monotonic()

    def _not_loaded(self, event: NotLoaded) -> None:
        """Counts a replica that could not load; one bad node must not end the run of the others."""
        if event.refused and not self.loaded_one:
            raise ValueError(str(event.error)) from event.error
        self.load_failures += 1
        node = self.fleet.node(event.replica)
        self.last_load_failure = (
            f"{self.load_failures} replicas in a row could not load the model, for lack of memory if they died "
            f"(the last on {node}): {_first_line(event.error)}"
        )
        self.view.say(self.last_load_failure, event="load_failed", node=node)

    def _taken_off(self, replica: int, shard: int) -> None:
        self.in_work[replica].discard(shard)
        self.alone.discard(replica)

    def _done(self, shard: int, commit: Commit, *, by_another: bool = False) -> None:
        """Counts a committed shard; another driver's shards do not count in this launch's rate."""
        self.work.commit(shard)
        self.failures.forget(shard)
        self.view.tally.add(commit, before=by_another)
        if not by_another:
            self.busy_seconds += commit.seconds.get("forward", 0.0)

    def _died(self, event: Died) -> None:
        shards = self.in_work.pop(event.replica, set())
        self.load_failures = 0  # it had loaded, so another one may
        self.alone.discard(event.replica)
        lost = []
        for shard in sorted(shards):  # it may have died between a commit and the answer
            commit = self.run.read_commit(shard)
            if commit is None:
                lost.append(shard)
            else:
                self._done(shard, commit)
        if lost and len(shards) == 1:
            self._failed(lost[0], event, suspect=True)
            return
        for shard in lost:
            self.work.put_back(shard, suspect=True)
        what = f"shards {', '.join(map(str, lost))} of it are tried one at a time" if lost else "it had nothing in work"
        node = self.fleet.node(event.replica)
        self.view.say(
            f"a replica on {node} died, {what}: {_first_line(event.error)}",
            event="replica_died", node=node, shards=lost,
        )  # fmt: skip

    def _failed(self, number: int, event: Failed | Died, *, suspect: bool) -> None:
        """Counts an attempt at a shard against it and says so."""
        node = self.fleet.node(event.replica)
        attempt = self.failures.record(self.plan.shards[number], event, node)
        if attempt.is_last:
            self.work.leave_out(number)
            self.view.tally.shards_failed += 1
        else:
            self.work.put_back(number, suspect=suspect)
        self.view.say(
            f"shard {number} failed on {node} (attempt {attempt.number} of {attempt.limit}), "
            f"{'left out' if attempt.is_last else 'to be tried again'}: {_first_line(attempt.reason)}",
            event="shard_failed", shard=number, attempt=attempt.number, left_out=attempt.is_last, node=node,
            error=attempt.reason,
        )  # fmt: skip

    # -- who gets what -----------------------------------------------------------------------------

    def _assign(self) -> None:
        """Hands out shards in rounds, so that no replica gets its second one before all have their first."""
        reserved = self._assign_suspects()
        for depth in range(IN_WORK):
            for replica, shards in self.in_work.items():
                if len(shards) != depth or replica in reserved:
                    continue
                if depth and self.work.waiting <= self.fleet.count("loading"):
                    return  # one is kept for each replica that will be there soon
                number = self._next()
                if number is None:
                    return
                self._give(replica, number)

    def _assign_suspects(self) -> set[int]:
        """Gives each shard that has to run alone its own replica; returns the replicas that get nothing else."""
        free = sorted(self.in_work.keys() - self.alone, key=lambda replica: (len(self.in_work[replica]), replica))
        emptying = free[: self.work.suspects]
        for replica in emptying:
            if not self.in_work[replica] and (number := self.work.take_suspect()) is not None:
                self.alone.add(replica)
                self._give(replica, number)
        return self.alone.union(emptying)

    def _give(self, replica: int, number: int) -> None:
        self.in_work[replica].add(number)
        self.fleet.assign(replica, self.plan.shards[number])

    def _next(self) -> int | None:
        """The next shard that nobody has committed meanwhile.

        Looking costs a round trip, so for shards of its own share it looks only once another driver was seen there.
        """
        while (number := self.work.take()) is not None:
            alone = self.work.is_own(number) and not self.has_company
            commit = None if alone else self.run.read_commit(number)
            if commit is None:
                return number
            self._done(number, commit, by_another=True)
        return None

    def _release_idle(self) -> None:
        if self.work.waiting:
            return
        for replica in [replica for replica, shards in self.in_work.items() if not shards]:
            del self.in_work[replica]
            self.fleet.release(replica)

    # -- what others do ----------------------------------------------------------------------------

    def _count_committed(self) -> set[int]:
        committed = set()
        for commit in self.run.commits():
            committed.add(commit.shard)
            self.view.tally.add(commit, before=True)
        return committed

    def _tell_left_out(self) -> None:
        self.view.tally.shards_failed = len(self.failures.left_out)
        for shard, failure in self.failures.left_out.items():
            self.view.say(
                f"shard {shard} failed {failure['attempts']} times before and stays out (--retry-failed tries it "
                f"again): {_first_line(failure['error'])}",
                event="shard_left_out", shard=shard, attempts=failure["attempts"], error=failure["error"],
            )  # fmt: skip

    def _take_out_what_others_did(self) -> None:
        news = self.work.found(self._listing.look())
        for number in news:
            self.failures.forget(number)
            self.view.tally.add_unread(self.plan.shards[number].planned)
        if not self.has_company and any(map(self.work.is_own, news)):
            self.has_company = True
            self.work.shuffle()


class _Listing:
    """Lists the commit records from time to time, in a thread, so that a long listing does not block the dispatcher."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.found: set[int] | None = None
        self.next = time.monotonic() + LISTING_SECONDS

    def look(self) -> set[int]:
        """Returns the result of a finished listing, once, and starts another one when it is due."""
        if time.monotonic() >= self.next:
            self.next = float("inf")
            threading.Thread(target=self._list, daemon=True).start()
        found, self.found = self.found, None
        return found or set()

    def _list(self) -> None:
        started = time.monotonic()
        with contextlib.suppress(Exception):  # any error of a store; the next listing may work again
            self.found = self.run.committed_shards()
        took = time.monotonic() - started
        self.next = time.monotonic() + max(LISTING_SECONDS, LISTING_SHARE * took)


def _first_line(error: BaseException | str) -> str:
    return str(error).partition("\n")[0]
