"""Drives a run from start to end: freezes the plan, starts the fleet, has it collect, marks the run complete.

All state that matters is in the run directory. So a driver may be killed at any moment and the same command resumes
the run, and two drivers on one run only waste work.
"""

from __future__ import annotations

import contextlib
import functools
import signal
from typing import TYPE_CHECKING, Any

from collector.config import CaptureConfig, DataConfig, LaunchConfig, ModelConfig, RunConfig, resolve
from collector.data import plan as planning
from collector.data import sources
from collector.fleet.dispatch import Dispatcher, Job
from collector.fleet.placement import Need, require_room
from collector.fleet.progress import ProgressView, Tally
from collector.fleet.ray_actor import ReplicaActor, ReplicaSpec
from collector.fleet.ray_cluster import alive_nodes, cluster, pick_device
from collector.fleet.ray_fleet import RayFleet
from collector.fleet.ray_metrics import Metrics
from collector.replica.completing import finish, record_card
from collector.store.run_directory import PLAN, RUN, RunDirectory
from collector.store.sweep_directory import SweepDirectory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from collector.data.plan import PartOf, Plan
    from collector.fleet.ray_actor import Actor
    from collector.models.loading import LoadedModel


def freeze_plan(
    run: RunDirectory, config: RunConfig, say: Callable[[str], None] = lambda _: None, part_of: PartOf | None = None
) -> Plan:
    """Writes the plan of a new run, or reads the plan of a run to resume.

    Args:
        run: the run directory.
        config: the settings.
        say: called with each warning about the documents.
        part_of: the documents, if they are those of another run.

    Raises:
        ValueError: the run was planned with other settings or other sources; names what differs.
    """
    stored = run.read_or_none(PLAN)
    if stored is None:
        if SweepDirectory(run.root).exists():
            raise ValueError(f"{run.root} holds a sweep, which is no place for a run: choose another --out")
        plan = new_plan(config, say, part_of)
        if run.store.put_new(PLAN, plan.to_parquet()):
            return plan
        stored = run.store.read(PLAN)
    plan = planning.Plan.from_parquet(stored)
    differences = planning.differences(plan.config, _settings(config, part_of))
    if not differences and part_of is not None and new_plan(config, say, part_of).hash != plan.hash:
        differences = ["other documents were selected"]
    differences = differences or planning.check_sources(plan, config)
    if differences:
        raise ValueError(
            f"{run.root} holds a run with another plan:\n  " + "\n  ".join(differences)
            + "\nGo on with the old settings, or choose another --out."
            + ("" if run.read_or_none(RUN) else " Nothing was collected there yet: you may delete the folder.")
        )  # fmt: skip
    return plan


def _settings(config: RunConfig, part_of: PartOf | None) -> dict[str, Any]:
    return config.to_dict() | dict(part_of.told if part_of else {})


def new_plan(
    config: RunConfig, say: Callable[[str], None] = lambda _: None, part_of: PartOf | None = None
) -> Plan:  # fmt: skip
    """Plans a run, after a look at whether the model's tokenizer can read the documents."""
    if part_of is not None:
        return planning.narrow(part_of.plan, _settings(config, part_of), config.data.docs_per_shard, part_of.rows)
    found = sources.resolve(config.data)
    conversations = planning.has_conversations(found, config.data)
    if conversations or config.data.spans_column is not None:
        from collector.capture.conversations import require_tokenizer
        from collector.models import loading

        require_tokenizer(loading.load_tokenizer(config.model), config.model.model, conversations=conversations)
    for warning in planning.label_warnings(found, config.data):
        say(warning)
    return planning.make_plan(config, found)


@contextlib.contextmanager
def connected(launch: LaunchConfig) -> Iterator[bool]:
    """Joins a cluster or starts a local Ray, as `cluster` does, and makes SIGTERM end the work like Ctrl-C."""
    # In this order: connecting makes Ray set a handler of its own.
    with cluster(launch) as grows, _terminate_like_interrupt():
        yield grows


@contextlib.contextmanager
def _terminate_like_interrupt() -> Iterator[None]:
    """Makes SIGTERM end the run like Ctrl-C: replicas stop, and the run can be resumed."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def collect(
    root: str, *, data: DataConfig, model: ModelConfig, capture: CaptureConfig, launch: LaunchConfig,
    part_of: PartOf | None = None,
) -> RunDirectory:  # fmt: skip
    """Runs or resumes a collection.

    Args:
        root: the run directory.
        data: the documents.
        model: the model.
        capture: what to record.
        launch: where the replicas run.
        part_of: the documents, if they are those of another run; `data` says how they are read.

    Returns:
        The run; `_SUCCESS` is there if every shard is committed.

    Raises:
        ValueError: settings, data or model are not usable, or belong to another run than `root`.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the run can be resumed.
    """
    with connected(launch) as grows:
        config = resolve(data=data, model=model, capture=capture, device=pick_device(launch, grows=grows))
        return collect_connected(root, config, launch, grows=grows, part_of=part_of)


def collect_connected(
    root: str, config: RunConfig, launch: LaunchConfig, *, grows: bool = False, part_of: PartOf | None = None
) -> RunDirectory:
    """Runs or resumes a collection on the connected Ray; see `collect`.

    Args:
        root: the run directory.
        config: what to record.
        launch: where the replicas run.
        grows: whether the cluster may get more nodes.
        part_of: the documents, if they are those of another run.
    """
    run, need, (least, _) = RunDirectory(root), Need.of(launch, config.device), launch.replica_range()
    require_room(need, alive_nodes(), least if grows else max(1, least))
    warnings: list[str] = []
    plan = freeze_plan(run, config, warnings.append, part_of)
    tally = Tally(shards=len(plan.shards), documents=plan.documents)
    with ProgressView(tally, as_json=launch.log_format == "json") as view:
        for warning in warnings:
            view.say(warning, event="warning")
        work_off(Job(run=run, plan=plan, launch=launch), config, view, need=need, grows=grows)
    finish(run, plan)
    return run


def work_off(
    job: Job, config: RunConfig, view: ProgressView, *, need: Need, grows: bool = False,
    actor_class: type[Actor] = ReplicaActor,
) -> None:  # fmt: skip
    """Collects the shards of a plan that are still to do, with replicas on the connected Ray.

    Args:
        job: the run, whose directory holds the plan.
        config: of the plan.
        view: where messages and progress go.
        need: the resources that a replica reserves.
        grows: whether the cluster may get more nodes.
        actor_class: the class of the actors.
    """
    run, plan, launch = job.run, job.plan, job.launch
    replica = ReplicaSpec(root=run.root, config=config, plan_hash=plan.hash, need=need, actor_class=actor_class)
    fleet = RayFleet(replica, most=launch.replica_range()[1], grows=grows, load_attempts=launch.max_attempts)
    accelerators = sorted({kind for node in alive_nodes() if need.slots(node) for kind in node.accelerators})
    hardware = {"gpus_per_replica": need.gpus, "cpus_per_replica": need.cpus or "all", "accelerators": accelerators}
    metrics = Metrics(run.root)
    accept_card = functools.partial(record_card, run, plan, hardware=hardware)
    dispatcher = Dispatcher(job, fleet, view, accept_card=accept_card, observe=metrics)
    try:
        dispatcher.dispatch()
    finally:
        fleet.stop()
        with dispatcher.observing:
            metrics(dispatcher, last=True)


def collect_in_process(
    root: str, config: RunConfig, *, loaded: LoadedModel | None = None, threads: int | None = None,
    part_of: PartOf | None = None,
) -> RunDirectory:  # fmt: skip
    """Collects a whole run in this process, without Ray; an error ends it.

    Args:
        root: the run directory, of a new run.
        config: what to record.
        loaded: the result of `loading.load` for this config, if there is one already.
        threads: CPU threads for the model (None: torch's default).
        part_of: the documents, if they are those of another run.
    """
    from collector.replica.replica import Replica

    run, plan = RunDirectory(root), new_plan(config, part_of=part_of)
    run.store.put_new(PLAN, plan.to_parquet())
    with contextlib.closing(Replica(root, config, plan.hash, loaded=loaded, threads=threads)) as replica:
        replica.write_vocabulary()
        record_card(run, plan, replica.card())
        for _ in replica.collect_all(plan.shards):
            pass
    finish(run, plan)
    return run
