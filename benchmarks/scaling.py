"""Measures how the collector scales with actors, shards and cores.

    python -m benchmarks.scaling --parts actors memory opening cores

- `actors`: 1 to 64 replicas on this machine whose model only sleeps for a fixed time. They do not load torch, but
  really write a part and commit each shard, in the three stages of a replica. Measured from when all are ready: shards
  per second against the ideal (one per pause and actor), and CPU seconds of the driver per 1,000 shards.
- `memory`: peak memory of plan and dispatcher for a number of shards, each in its own process.
- `opening`: seconds until a finished run is open for queries, with its manifest and without.
- `cores`: the demo model in two replicas of one core against one of two cores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from collector.data.plan import Plan, Shard
from collector.fleet.ray_actor import Actor
from collector.pipeline import Pipeline, Stage
from collector.store.run_directory import PLAN, Commit, RunDirectory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from collector.config import LaunchConfig, RunConfig
    from collector.fleet.dispatch import Dispatcher, Job

Part = Literal["actors", "memory", "opening", "cores"]
CARD = {"memory": {"summary": "a pause"}, "model": {}, "layers": [], "tokenizer": {}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
    """Measure how the collector scales with actors, shards and cores."""

    parts: tuple[Part, ...] = ("actors", "memory", "opening", "cores")
    """What to measure."""
    actors: tuple[int, ...] = (1, 4, 16, 64)
    """Numbers of replicas."""
    pause: float = 1.0
    """Seconds that a replica's device takes per shard."""
    window: float = 30.0
    """Seconds to measure, once all replicas are ready."""
    shards: int = 1_000_000
    """Shards of the plan for `memory`."""
    finished_shards: int = 100_000
    """Shards of the run for `opening`."""
    documents: int = 6_000
    """Documents of the demo for `cores`."""
    child: Literal["plan", "dispatcher", "open"] | None = None
    """Internal: what a child process of the benchmark measures."""
    root: str = ""
    """Internal: the run that a child process opens."""


# -- actors ------------------------------------------------------------------------------------------


class PauseActor(Actor):
    """A replica whose model only sleeps; everything else is real."""

    def load(self, root: str, config: RunConfig, plan_hash: str, *_: Any) -> dict[str, Any]:
        """Opens the run; the model's name is the length of the pause."""
        assert "torch" not in sys.modules, "it is to be light"
        self.run, self.plan_hash = RunDirectory(root), plan_hash
        self.seconds = float(config.model.model)
        self.pipeline = Pipeline(
            Stage(name="read", step=lambda shard: shard),
            Stage(name="device", step=self.pause),
            Stage(name="write", step=self.write),
        )
        return CARD

    def collect(self, shard: Shard) -> Commit:
        """Passes one shard through the three stages."""
        return self.pipeline.submit(shard).result()

    def pause(self, shard: Shard) -> Shard:
        """Sleeps in place of the model."""
        time.sleep(self.seconds)
        return shard

    def write(self, shard: Shard) -> Commit:
        """Publishes a small part and commits it."""
        attempt = uuid.uuid4().hex[:12]
        with self.run.scratch() as scratch:
            path = Path(scratch) / "routing"
            path.write_bytes(b"0" * 4096)
            part = self.run.publish_part(path, shard.shard, attempt, "routing", 1)
        return self.run.commit(commit_of(shard.shard, attempt, self.plan_hash, {"routing": part}))


def commit_of(shard: int, attempt: str, plan_hash: str, files: dict[str, Any]) -> Commit:
    """Returns a commit record of one document and ten tokens."""
    return Commit(
        shard=shard, attempt=attempt, plan_hash=plan_hash, files=files, documents=1, tokens=10, rows=1, characters=1,
        truncated=0, skipped={}, batches=1, padded_tokens=10, seconds={"forward": 1.0, "idle": 0.0}, node="here",
    )  # fmt: skip


def plan_of(shards: int) -> Plan:
    """Returns a plan with one document per shard."""
    return Plan(
        config={},
        shards=tuple(
            Shard(shard=number, source="s", name="s", kind="text", first_row=number, rows=1, offset=number, keep=None,
                  fingerprint="f")
            for number in range(shards)
        ),
    )  # fmt: skip


class WindowOver(Exception):  # noqa: N818 - not an error
    """Raised when the measurement window is over."""


class Window:
    """Measures for a number of seconds, from when all replicas are ready."""

    def __init__(self, replicas: int, seconds: float) -> None:
        self.replicas, self.seconds = replicas, seconds
        self.began: tuple[float, float, int] | None = None
        self.found: tuple[float, float, int] = (0.0, 0.0, 0)

    def __call__(self, dispatcher: Dispatcher) -> None:
        """Observes the dispatcher after each of its rounds."""
        now = time.monotonic(), time.process_time(), dispatcher.view.tally.shards_done
        if self.began is None:
            if dispatcher.fleet.count("ready") == self.replicas:
                self.began = now
        elif now[0] - self.began[0] >= self.seconds:
            self.found = now[0] - self.began[0], now[1] - self.began[1], now[2] - self.began[2]
            raise WindowOver


@contextlib.contextmanager
def local_ray(cpus: int) -> Iterator[None]:
    """Starts a local Ray with this many logical cores, regardless of the machine."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init("local", num_cpus=cpus, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False,
             logging_level=logging.ERROR)  # fmt: skip
    try:
        yield
    finally:
        ray.shutdown()


def actors(bench: Scaling) -> None:
    """Prints shards per second for each number of replicas, against the ideal."""
    print(f"\n### Actors ({bench.pause:g} s per shard and actor, {bench.window:g} s each)\n")
    print("| actors | shards/s | ideal | of ideal | driver CPU s per 1,000 shards |")
    print("|---|---|---|---|---|")
    with local_ray(max(bench.actors)):
        for count in bench.actors:
            seconds, cpu, shards = pauses(count, bench)
            rate, ideal = shards / seconds, count / bench.pause
            print(f"| {count} | {rate:.2f} | {ideal:.2f} | {rate / ideal:.3f} | {1000 * cpu / max(1, shards):.2f} |",
                  flush=True)  # fmt: skip


def pauses(count: int, bench: Scaling) -> tuple[float, float, int]:
    """Returns wall seconds, CPU seconds of the driver, and shards in the measurement window of `count` replicas."""
    from collector.config import CaptureConfig, DataConfig, ModelConfig, RunConfig
    from collector.fleet.dispatch import Dispatcher, Job
    from collector.fleet.placement import Need
    from collector.fleet.ray_actor import ReplicaSpec
    from collector.fleet.ray_fleet import RayFleet

    config = RunConfig(data=DataConfig(), model=ModelConfig(model=str(bench.pause)), capture=CaptureConfig(),
                       device="cpu")  # fmt: skip
    # More shards than the replicas can finish while starting and in the window.
    made = plan_of(int(count * (bench.window + 30 + 3 * count) / bench.pause))
    window = Window(count, bench.window)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as root:  # actors that were killed may still write
        replica = ReplicaSpec(root=root, config=config, plan_hash=made.hash, need=Need(cpus=1), actor_class=PauseActor)
        fleet = RayFleet(replica, most=count)
        try:
            with quiet_view(made) as view, contextlib.suppress(WindowOver):
                job = Job(run=RunDirectory(root), plan=made, launch=LaunchConfig(max_attempts=1))
                Dispatcher(job, fleet, view, observe=window).dispatch()
        finally:
            fleet.stop()
    if not window.found[2]:
        raise RuntimeError(f"the work of {count} replicas was over before the window was")
    return window.found


def quiet_view(made: Plan) -> Any:
    """Returns a progress view without output."""
    from rich.console import Console

    from collector.fleet.progress import ProgressView, Tally

    return ProgressView(Tally(shards=len(made.shards), documents=made.documents), Console(file=io.StringIO()))


# -- memory ------------------------------------------------------------------------------------------


def memory(bench: Scaling) -> None:
    """Prints the peak memory of a driver with a plan and with a dispatcher."""
    print(f"\n### Driver memory, {bench.shards:,} shards\n\n| process holds | peak memory | seconds |\n|---|---|---|")
    for child, shards in (("plan", 1), ("plan", bench.shards), ("dispatcher", bench.shards)):
        megabytes, seconds = in_child("--child", child, "--shards", str(shards))
        print(f"| {child} of {shards:,} shards | {megabytes:,.0f} MB | {seconds:.1f} |", flush=True)


def in_child(*arguments: str) -> tuple[float, float]:
    """Runs a child process of this benchmark; returns its peak memory in MB, and seconds."""
    output = subprocess.run([sys.executable, "-m", "benchmarks.scaling", *arguments], check=True, capture_output=True,
                            text=True).stdout  # fmt: skip
    megabytes, seconds = output.splitlines()[-1].split()
    return float(megabytes), float(seconds)


def child(bench: Scaling) -> None:
    """Runs one measurement and prints peak memory in MB, and seconds."""
    if bench.child == "open":
        seconds = opened(bench.root)
    else:
        started = time.perf_counter()
        made = plan_of(bench.shards)
        if bench.child == "dispatcher":
            dispatcher_over(made)
        seconds = time.perf_counter() - started
    # Not ru_maxrss, which starts with the parent's memory.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) / 1000, seconds)


def dispatcher_over(made: Plan) -> Dispatcher:
    """Returns the dispatcher of a run that has not started."""
    from collector.fleet.dispatch import Dispatcher, Job

    fleet: Any = None
    with tempfile.TemporaryDirectory() as root, quiet_view(made) as view:
        return Dispatcher(Job(run=RunDirectory(root), plan=made, launch=LaunchConfig()), fleet, view)


# -- opening -----------------------------------------------------------------------------------------


def opening(bench: Scaling) -> None:
    """Prints the seconds until a run of many shards is open, with its manifest and without."""
    print(f"\n### Opening a finished run of {bench.finished_shards:,} shards\n")
    print("| commit records read from | seconds | peak memory |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        run = finished_run(Path(folder) / "run", bench.finished_shards)
        for name, prepare in (("the manifest", lambda: None), ("their own files", run.reopen)):
            prepare()
            megabytes, seconds = in_child("--child", "open", "--root", run.root)
            print(f"| {name} | {seconds:.2f} | {megabytes:,.0f} MB |", flush=True)


def finished_run(root: Path, shards: int) -> RunDirectory:
    """Creates a run with one real shard, whose commit record is repeated under other numbers."""
    from collector.config import CaptureConfig, DataConfig, ModelConfig, resolve
    from collector.fleet import driver

    config = resolve(data=DataConfig(limit=8), model=ModelConfig(), capture=CaptureConfig(), device="cpu")
    run = driver.collect_in_process(str(root), config)
    run.reopen()
    (commit,) = run.commits()
    for number in range(1, shards):  # plain files, because committing is not measured here
        path = root / "commits" / f"{number:06d}.json"
        path.write_bytes(dataclasses.replace(commit, shard=number).to_json())
    made = plan_of(shards)
    run.store.put(PLAN, made.to_parquet())
    run.finish(made.hash, shards)
    return run


def opened(root: str) -> float:
    """Returns the seconds to read all commit records and create the views."""
    from collector import open_run

    started = time.perf_counter()
    open_run(root)
    return time.perf_counter() - started


# -- cores -------------------------------------------------------------------------------------------


def cores(bench: Scaling) -> None:
    """Prints tokens per second of one and two replicas with one or two cores, through the whole collector."""
    from collector.config import LaunchConfig

    print(f"\n### Cores (demo model, {bench.documents:,} documents)\n\n| replicas | tokens/s |\n|---|---|")
    for replicas, each in ((1, 1), (1, 2), (2, 1)):
        launch = LaunchConfig(replicas=replicas, cpus_per_replica=each)
        print(f"| {replicas} of {each} cores | {demo_rate(launch, bench.documents):,.0f} |", flush=True)


def demo_rate(launch: LaunchConfig, documents: int) -> float:
    """Returns tokens per second, measured from when the first replica is ready."""
    from collector.config import CaptureConfig, DataConfig, ModelConfig, resolve
    from collector.fleet import driver
    from collector.fleet.placement import Need

    config = resolve(data=DataConfig(limit=documents, docs_per_shard=128), model=ModelConfig(),
                     capture=CaptureConfig(), device="cpu")  # fmt: skip
    root = tempfile.mkdtemp()
    try:
        run = RunDirectory(root)
        made = driver.freeze_plan(run, config)
        with local_ray(2), quiet_view(made) as view:
            driver.work_off(Job(run=run, plan=made, launch=launch), config, view, need=Need.of(launch, "cpu"))
            return view.tally.tokens_per_second
    finally:
        shutil.rmtree(root)


def main(bench: Scaling) -> None:
    """Runs the chosen parts."""
    if bench.child:
        child(bench)
        return
    print(f"python -m benchmarks.scaling {' '.join(sys.argv[1:])}\n{os.cpu_count()} cores", flush=True)
    run: dict[str, Callable[[Scaling], None]] = {
        "actors": actors, "memory": memory, "opening": opening, "cores": cores,
    }  # fmt: skip
    for part in bench.parts:
        run[part](bench)


if __name__ == "__main__":
    main(tyro.cli(Scaling))
