"""The driver: places replicas on a Ray cluster, hands out shards, survives their deaths.

The only module that imports Ray. Its own actors and a `ray.wait` loop, one shard per call, no
retries by Ray: the driver sees every death, starts a replacement, gives the shard to another
replica, counts the attempts and leaves out a shard that fails again and again. Only commit
records cross Ray's object store; parts go from the replica to the store.

The driver holds no state that matters: what counts is in the run directory, so killing it at any
moment leaves a run that the same command resumes, and two drivers on one run only waste work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import random
import signal
import time
from collections import Counter, deque
from typing import TYPE_CHECKING, Any

import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.exceptions import RayError, RayTaskError

from collector import plan as planning
from collector.config import CaptureConfig, DataConfig, LaunchConfig, ModelConfig, RunConfig, Spread, resolve
from collector.progress import ProgressView, Tally
from collector.storage import PLAN, RUN, SUCCESS, VIEWS, Commit, RunDirectory
from collector.warehouse import views_sql

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from collector.models import LoadedModel
    from collector.plan import Plan, Shard

FORMAT = 1
"""Version of the run directory's layout."""
WAIT_SECONDS = 0.5
OBJECT_STORE_BYTES = 100 * 2**20
"""Of a Ray that we start ourselves: only small reports pass through it."""


class ReplicaActor:
    """What runs in an actor. Loading is a call of its own, so that its errors arrive as they are."""

    def load(
        self, root: str, config: RunConfig, plan_hash: str, threads: int | None, spread: Spread | None
    ) -> dict[str, Any]:
        """Loads the replica; returns its card for run.json."""
        from collector import models
        from collector.replica import Replica

        loaded = models.load(config.model, config.device, spread)
        self.replica = Replica(root, config, plan_hash, threads=threads, loaded=loaded)
        self.replica.write_vocabulary()
        return self.replica.card()

    def collect(self, shard: Shard) -> Commit:
        """Collects one shard."""
        return self.replica.collect(shard)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """How many replicas, and what Ray reserves for each."""

    replicas: int
    cpus: int
    gpus: float
    spread: Spread | None = None
    """Over which devices a replica's weights go, if not on one."""


# -- Ray ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def cluster(launch: LaunchConfig) -> Iterator[None]:
    """Joins the cluster that was named, or starts a local Ray and ends it afterwards."""
    address = launch.ray_address or os.environ.get("RAY_ADDRESS") or "local"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would announce here that future versions leave the GPUs visible to actors without any.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if ray.is_initialized():
        yield
        return
    if address != "local":
        # Ray starts clusters with a token where there is one, but joins by address without, unless told.
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    local: dict[str, Any] = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **(local if address == "local" else {}))
    try:
        yield
    finally:
        ray.shutdown()


def pick_device(launch: LaunchConfig) -> Any:
    """`cuda` where asked for or where the cluster has GPUs.

    Raises:
        ValueError: GPUs are asked for and the cluster has none.
    """
    gpus = ray.cluster_resources().get("GPU", 0)
    if launch.device == "cuda" and not gpus:
        raise ValueError("--device cuda: Ray sees no GPU; use --device cpu, or join a cluster with --ray-address")
    if launch.device == "auto":
        return "cuda" if gpus else "cpu"
    return launch.device


def place(launch: LaunchConfig, device: str) -> Placement:
    """Sizes the fleet for the nodes that are there.

    Raises:
        ValueError: no node holds even one replica.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if device == "cuda":
        gpus = launch.gpus_per_replica
        cpus = launch.cpus_per_replica or 1
        room = sum(int(min(node.get("GPU", 0) / gpus, node["CPU"] // cpus)) for node in nodes)
    else:
        gpus = 0.0
        cpus = launch.cpus_per_replica or int(min((node["CPU"] for node in nodes), default=1))
        room = sum(int(node["CPU"] // cpus) for node in nodes)
    if not room:
        raise ValueError(
            f"no node has room for a replica with {cpus} CPUs and {gpus:g} GPUs; nodes have "
            f"{[(int(node['CPU']), node.get('GPU', 0)) for node in nodes]} (CPUs, GPUs)"
        )
    return Placement(replicas=launch.replicas or room, cpus=cpus, gpus=gpus, spread=launch.spread(device))


# -- the plan ----------------------------------------------------------------------------------------


def freeze_plan(run: RunDirectory, config: RunConfig) -> Plan:
    """Writes the plan of a new run, or reads that of a run to resume.

    Raises:
        ValueError: the run was planned with other settings or other sources; names what differs.
    """
    stored = run.read_or_none(PLAN)
    if stored is None:
        plan = planning.make_plan(config)
        if run.store.put_new(PLAN, plan.to_parquet()):
            return plan
        stored = run.store.read(PLAN)
    plan = planning.Plan.from_parquet(stored)
    differences = planning.differences(plan.config, config.to_dict()) or planning.check_sources(plan, config)
    if differences:
        raise ValueError(
            f"{run.root} holds a run with another plan:\n  " + "\n  ".join(differences)
            + "\nGo on with the old settings, or choose another --out."
        )  # fmt: skip
    return plan


def record_card(run: RunDirectory, plan: Plan, card: dict[str, Any]) -> None:
    """Writes run.json from the first replica's card; every later card must agree with it.

    Raises:
        ValueError: a replica holds another model than the run was begun with; names what differs.
    """
    described = {
        "format": FORMAT,
        "config": plan.config,
        "plan_hash": plan.hash,
        "plan": {"shards": len(plan.shards), "documents": plan.documents},
        **card,
    }
    if run.store.put_new(RUN, json.dumps(described, indent=1).encode() + b"\n"):
        return
    recorded = run.read_json(RUN)
    different = [key for key in ("model", "layers", "memory", "tokenizer") if recorded.get(key) != card[key]]
    if different:
        details = "; ".join(f"{key}: {recorded.get(key)} -> {card[key]}" for key in different)
        raise ValueError(f"{run.root} was begun with another model than this replica loaded ({details})")


# -- dispatch ----------------------------------------------------------------------------------------


def in_order(shards: Iterable[Shard], share: tuple[int, int]) -> list[Shard]:
    """This driver's own shards first, then everybody else's.

    The others' come shuffled, differently in each driver: in the same order, all that help would take the same
    shard at the same time, again and again.
    """
    remainder, parts = share
    own: list[Shard] = []
    others: list[Shard] = []
    for shard in shards:
        (own if shard.shard % parts == remainder else others).append(shard)
    random.Random(remainder).shuffle(others)
    return own + others


class Dispatcher:
    """Hands shards to replicas until none is left to hand out."""

    def __init__(
        self, *, run: RunDirectory, plan: Plan, config: RunConfig, placement: Placement, max_attempts: int,
        view: ProgressView, share: tuple[int, int] = (0, 1),
    ) -> None:  # fmt: skip
        self.run = run
        self.plan = plan
        self.config = config
        self.placement = placement
        self.max_attempts = max_attempts
        self.view = view
        done = run.committed_shards()
        self.waiting = deque(in_order((shard for shard in plan.shards if shard.shard not in done), share))
        self.attempts: Counter[int] = Counter()
        self.loaded_one = False
        self.load_failures = 0
        self.loading: dict[Any, Any] = {}
        self.working: dict[Any, tuple[Any, Shard]] = {}

    def dispatch(self) -> None:
        """Returns when every shard is committed or has failed its last attempt.

        Raises:
            ValueError: the model cannot be loaded, or a replica loaded another than the run began with.
            RuntimeError: no replica is left, and none can be loaded any more.
        """
        for _ in range(min(self.placement.replicas, len(self.waiting))):
            self._start_replica()
        while self.waiting or self.working:
            ready, _ = ray.wait([*self.working, *self.loading], timeout=WAIT_SECONDS)
            for reference in ready:
                if reference in self.loading:
                    self._loaded(reference)
                else:
                    self._worked(reference)
            self.view.tick()

    def stop(self) -> None:
        """Ends all replicas at once; what they did not commit does not count."""
        for actor in [*self.loading.values(), *(actor for actor, _ in self.working.values())]:
            ray.kill(actor)

    def _start_replica(self) -> None:
        placement = self.placement
        options = {"num_cpus": placement.cpus, "num_gpus": placement.gpus, "max_restarts": 0, "max_task_retries": 0}
        actor: Any = ray.remote(ReplicaActor).options(**options).remote()
        threads = placement.cpus if self.config.device == "cpu" else None
        self.loading[actor.load.remote(self.run.root, self.config, self.plan.hash, threads, placement.spread)] = actor

    def _loaded(self, reference: Any) -> None:
        actor = self.loading.pop(reference)
        try:
            card = ray.get(reference)
        except RayError as error:
            self._failed_to_load(error)
            return
        record_card(self.run, self.plan, card)
        self.load_failures = 0
        if not self.loaded_one:  # rates and ETA count from here
            self.loaded_one = True
            self.view.say(f"replica: {card['memory']['summary']}")
            self.view.note = ""
            self.view.tally.started = time.monotonic()
        self._assign(actor)

    def _failed_to_load(self, error: RayError) -> None:
        """Tries again, as long as there is hope: one bad node must not end the run of the others."""
        if isinstance(error, RayTaskError) and not self.loaded_one:
            raise ValueError(str(error.cause)) from error
        self.load_failures += 1
        reason = f"{self.load_failures} replicas in a row could not load the model, for lack of memory if they died"
        if self.load_failures < self.max_attempts:
            self._start_replica()
        elif not self.working and not self.loading:
            raise RuntimeError(f"{reason}: {error}") from error
        self.view.say(f"{reason}: {str(error).splitlines()[0]}")

    def _assign(self, actor: Any) -> None:
        """Gives a free replica the next shard that nobody committed meanwhile, or lets it go."""
        while self.waiting:
            shard = self.waiting.popleft()
            commit = self.run.read_commit(shard.shard)
            if commit is None:
                self.working[actor.collect.remote(shard)] = actor, shard
                return
            self._done(shard, commit, by_another=True)
        ray.kill(actor)

    def _done(self, shard: Shard, commit: Commit, *, by_another: bool = False) -> None:
        """Counts a committed shard; one of another driver has no part in this launch's rate."""
        self.run.clear_failure(shard.shard)
        self.view.tally.add(commit, before=by_another)

    def _worked(self, reference: Any) -> None:
        actor, shard = self.working.pop(reference)
        try:
            commit = ray.get(reference)
        except RayTaskError as error:
            self._failed(shard, error.cause, str(error))
        except RayError as error:  # the replica is gone, or its answer is
            self._failed(shard, error, str(error))
            if self.waiting:
                self._start_replica()
            return
        else:
            self._done(shard, commit)
        self._assign(actor)

    def _failed(self, shard: Shard, error: BaseException, trace: str) -> None:
        commit = self.run.read_commit(shard.shard)
        if commit is not None:  # it died between its commit and its answer
            self._done(shard, commit)
            return
        self.attempts[shard.shard] += 1
        attempt = self.attempts[shard.shard]
        final = attempt >= self.max_attempts
        reason = f"{type(error).__name__}: {error}"
        failure = {
            "shard": shard.shard,
            "source": shard.source,
            "first_row": shard.first_row,
            "rows": shard.rows,
            "attempts": attempt,
            "error": reason,
            "traceback": trace,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        self.run.record_failure(shard.shard, failure)
        outcome = "left out" if final else "to be tried again"
        what = f"shard {shard.shard} failed (attempt {attempt} of {self.max_attempts}), {outcome}"
        self.view.say(f"{what}: {reason.splitlines()[0]}")
        if final:
            self.view.tally.shards_failed += 1
        else:
            self.waiting.append(shard)


@contextlib.contextmanager
def _terminate_like_interrupt() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does: replicas stopped, run resumable."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def collect(
    root: str, *, data: DataConfig, model: ModelConfig, capture: CaptureConfig, launch: LaunchConfig
) -> RunDirectory:
    """Runs or resumes a collection.

    Args:
        root: the run directory.
        data: which documents.
        model: which model.
        capture: what to record.
        launch: where.

    Returns:
        The run; `_SUCCESS` is there if every shard is committed.

    Raises:
        ValueError: settings, data or model are not usable, or belong to another run than `root`.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the run can be resumed.
    """
    run = RunDirectory(root)
    # In this order: connecting makes Ray set a handler of its own.
    with cluster(launch), _terminate_like_interrupt():
        config = resolve(data=data, model=model, capture=capture, device=pick_device(launch))
        placement = place(launch, config.device)
        plan = freeze_plan(run, config)
        tally = Tally(shards=len(plan.shards), documents=plan.documents)
        for commit in run.commits():
            tally.add(commit, before=True)
        with ProgressView(tally) as view:
            dispatcher = Dispatcher(run=run, plan=plan, config=config, placement=placement,
                                    max_attempts=launch.max_attempts, view=view, share=launch.share())  # fmt: skip
            try:
                dispatcher.dispatch()
            finally:
                dispatcher.stop()
    finish(run, plan)
    return run


def finish(run: RunDirectory, plan: Plan) -> None:
    """Marks the run complete if every shard of the plan is committed."""
    if run.committed_shards() == {shard.shard for shard in plan.shards}:
        run.store.put(VIEWS, views_sql(run).encode())
        run.store.put_new(SUCCESS, json.dumps({"plan_hash": plan.hash, "shards": len(plan.shards)}).encode() + b"\n")


def collect_in_process(
    root: str, config: RunConfig, *, loaded: LoadedModel | None = None, threads: int | None = None
) -> RunDirectory:
    """A whole run without Ray, shard after shard in this process; an error ends it.

    Args:
        root: the run directory, of a new run.
        config: what to record.
        loaded: what `models.load` gave for this config, if it is there already.
        threads: CPU threads for the model (None: torch's default).
    """
    from collector.replica import Replica

    run, plan = RunDirectory(root), planning.make_plan(config)
    run.store.put_new(PLAN, plan.to_parquet())
    with contextlib.closing(Replica(root, config, plan.hash, loaded=loaded, threads=threads)) as replica:
        replica.write_vocabulary()
        record_card(run, plan, replica.card())
        for shard in plan.shards:
            replica.collect(shard)
    finish(run, plan)
    return run
