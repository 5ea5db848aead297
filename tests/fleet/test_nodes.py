"""Work follows the nodes of a Ray cluster: they come and go, differ, and are chosen by label.

One head without cores; every test adds the worker nodes that it needs, as processes of this machine.
"""

from __future__ import annotations

import contextlib
import io
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from rich.console import Console

from collector.config import CaptureConfig, DataConfig, LaunchConfig, ModelConfig, resolve
from collector.fleet import driver, ray_actor, ray_cluster, ray_fleet
from collector.fleet.dispatch import Job
from collector.fleet.placement import Need
from collector.fleet.progress import ProgressView, Tally
from collector.pipeline import DeviceLost
from collector.store.run_directory import SUCCESS, RunDirectory
from tests.helpers.runs import assert_same_content, collect_here, run_config, write_jsonl

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SHARDS, PER_SHARD = 40, 3
HURRY = "hurry"
HEALTH = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_timeout_ms": 500,
          "health_check_failure_threshold": 3}  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_folder):
    """Settings of a run, and the same run undisturbed, in process."""
    folder = tmp_path_factory.mktemp("job")
    texts = write_jsonl(folder / "texts.jsonl", SHARDS * PER_SHARD)
    config = run_config(DataConfig(data=(str(texts),), docs_per_shard=PER_SHARD), ModelConfig(model=str(tiny_folder)))
    return config, collect_here(folder / "quiet", config, threads=1)


@pytest.fixture(scope="module")
def head():
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": HEALTH})
    ray.init(made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def nodes(head):
    """Adds nodes to the cluster; they go with the test."""
    added = []

    def add(cpus: int = 1, **labels: str):
        added.append(head.add_node(num_cpus=cpus, labels=labels or None))
        return added[-1]

    yield add
    for node in added:
        if node in head.worker_nodes:
            head.remove_node(node, allow_graceful=False)
    gone = {node.node_id for node in added}
    wait_for(lambda: not gone & {node.id for node in ray_cluster.alive_nodes()})


@pytest.fixture(scope="module")
def worker(head):
    """A node with one core for all tests that need no more, and that come last: it stays."""
    return head.add_node(num_cpus=1)


def slow_actor(folder: Path, pause: float) -> type[ray_actor.ReplicaActor]:
    """A replica that takes its time, if need be, and leaves a mark for each shard: on which node, with how many cores.

    It hurries once there is a file `hurry` beside its marks.
    """
    hurry = folder.parent / HURRY

    class ReplicaActor(ray_actor.ReplicaActor):
        def collect(self, shard):
            context = ray.get_runtime_context()
            cores = int(context.get_assigned_resources()["CPU"])
            (folder / f"{shard.shard}-{context.get_node_id()}-{cores}").touch()
            until = time.monotonic() + pause
            while time.monotonic() < until and not hurry.exists():
                time.sleep(0.05)
            return super().collect(shard)

    return ReplicaActor


class Watched:
    """A run in a folder of its own, with what it said and where its shards were."""

    def __init__(self, folder: Path, config, **launch) -> None:
        self.config, self.launch = config, LaunchConfig(**launch)
        self.run = RunDirectory(folder / "run")
        self.folder, self.marks = folder, folder / "marks"
        self.marks.mkdir()
        self.said = io.StringIO()

    def collect(self, pause: float = 0.1, actor_class: type[ray_actor.ReplicaActor] | None = None) -> None:
        plan, need = driver.freeze_plan(self.run, self.config), Need.of(self.launch, "cpu")
        tally = Tally(shards=len(plan.shards), documents=plan.documents)
        with ProgressView(tally, Console(file=self.said, width=200)) as view:
            driver.work_off(Job(run=self.run, plan=plan, launch=self.launch), self.config, view, need=need, grows=True,
                            actor_class=actor_class or slow_actor(self.marks, pause))  # fmt: skip
        driver.finish(self.run, plan)

    @contextlib.contextmanager
    def at_work(self, pause: float):
        """Collects beside the block, which may change the cluster: Ray starts nodes in the main thread only."""
        with ThreadPoolExecutor(max_workers=1) as beside:
            collecting = beside.submit(self.collect, pause)
            yield
            collecting.result(timeout=120)

    def hurry(self) -> None:
        """Nothing is left to wait for."""
        (self.folder / HURRY).touch()

    def where(self) -> dict[str, int]:
        """Node -> cores of the replicas that worked there."""
        marks = [mark.name.split("-") for mark in self.marks.iterdir()]
        return {node: int(cores) for _, node, cores in marks}

    def wait_for_commits(self, count: int) -> None:
        wait_for(lambda: len(self.run.committed_shards()) >= count)


def wait_for(condition, timeout: float = 90) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def test_a_node_that_comes_gets_a_replica(tmp_path, job, nodes):
    config, quiet = job
    first = nodes()
    watched = Watched(tmp_path, config, cpus_per_replica=1)
    with watched.at_work(pause=4.0):
        watched.wait_for_commits(3)
        assert watched.where() == {first.node_id: 1}
        second = nodes()
        wait_for(lambda: second.node_id in watched.where())
        watched.hurry()
    assert watched.where() == {first.node_id: 1, second.node_id: 1}
    assert_same_content(watched.run, quiet)


@pytest.mark.parametrize("graceful", [True, False])
def test_the_shards_of_a_node_that_goes_are_done_elsewhere(tmp_path, job, head, nodes, graceful):
    config, quiet = job
    stays, goes = nodes(), nodes()
    watched = Watched(tmp_path, config, cpus_per_replica=1)
    with watched.at_work(pause=2.0):  # slow, so that work is left however late Ray notices
        wait_for(lambda: goes.node_id in watched.where())
        watched.wait_for_commits(2)
        if graceful:
            head.remove_node(goes)
        else:
            psutil.Process(goes.all_processes["raylet"][0].process.pid).kill()
        wait_for(lambda: "died, shard" in watched.said.getvalue())
        watched.hurry()
    assert watched.where() == {stays.node_id: 1, goes.node_id: 1}
    assert (tmp_path / "run" / SUCCESS).exists()
    assert watched.run.failures() == {}
    assert_same_content(watched.run, quiet)


def test_nodes_with_different_numbers_of_cores_get_what_fits_them(tmp_path, job, nodes):
    config, quiet = job
    small, large = nodes(1), nodes(2)
    watched = Watched(tmp_path, config)
    watched.collect()
    assert watched.where() == {small.node_id: 1, large.node_id: 2}, "all cores of its node"
    assert_same_content(watched.run, quiet)


def test_a_label_chooses_the_nodes(tmp_path, job, nodes):
    config, quiet = job
    chosen, _ = nodes(1, zone="a"), nodes(1, zone="b")
    watched = Watched(tmp_path, config, cpus_per_replica=1, node_labels=("zone=!b",), replicas=2)
    watched.collect(pause=0.0)
    assert watched.where() == {chosen.node_id: 1}
    assert_same_content(watched.run, quiet)


def test_a_run_may_wait_for_its_first_node(tmp_path, job, nodes, monkeypatch):
    config, _ = job
    monkeypatch.setattr(ray_fleet, "PATIENCE", 0.5)
    watched = Watched(tmp_path, config, cpus_per_replica=1, replicas="0:2", node_labels=("zone=c",))
    with watched.at_work(pause=0.0):
        wait_for(lambda: "replicas wait" in watched.said.getvalue())
        added = nodes(1, zone="c")
    assert "2 replicas wait for 1 CPUs and the label zone=c each, 2 for nodes to come" in watched.said.getvalue()
    assert watched.where() == {added.node_id: 1}
    assert (tmp_path / "run" / SUCCESS).exists()


def test_the_nodes_of_the_cluster_are_read_with_labels_and_resources(nodes):
    added = nodes(2, zone="d")
    (found,) = [node for node in ray_cluster.alive_nodes() if node.id == added.node_id]
    assert (found.cpus, found.gpus, found.labels["zone"]) == (2, 0, "d")
    assert resolve(data=DataConfig(), model=ModelConfig(), capture=CaptureConfig(),
                   device=ray_cluster.pick_device(LaunchConfig())).device == "cpu"  # fmt: skip


# ---- on one node that stays ----


@pytest.mark.usefixtures("worker")
def test_a_replica_that_lost_its_device_is_replaced_and_its_shard_not_blamed_beside_others(tmp_path, job):
    config, quiet = job
    watched = Watched(tmp_path, config, cpus_per_replica=1)
    marks, slow = watched.marks, slow_actor(watched.marks, 0.2)

    class ReplicaActor(slow):
        def collect(self, shard):
            if shard.shard == 5 and not list(marks.glob("5-*")):
                (marks / f"5-{ray.get_runtime_context().get_node_id()}-1").touch()
                raise DeviceLost("CUDA error: an illegal memory access was encountered")
            return super().collect(shard)

    watched.collect(actor_class=ReplicaActor)
    said = watched.said.getvalue()
    assert "died, shards " in said
    assert "tried one at a time: CUDA error: an illegal memory access was encountered" in said
    assert watched.run.failures() == {}
    assert_same_content(watched.run, quiet)


@pytest.mark.usefixtures("worker")
def test_a_replica_that_is_ready_before_its_node_is_known_finishes_its_shards(tmp_path, job):
    class ReplicaActor(ray_actor.ReplicaActor):
        def where(self):
            while not hasattr(self, "replica"):
                time.sleep(0.05)
            time.sleep(1)
            return super().where()

    watched = Watched(tmp_path, job[0])
    watched.collect(actor_class=ReplicaActor)
    assert_same_content(watched.run, job[1])


@pytest.mark.usefixtures("worker")
def test_a_cluster_that_holds_too_few_replicas_is_refused(tmp_path, job):
    config, _ = job
    launch = LaunchConfig(cpus_per_replica=1, replicas="3:8")
    with pytest.raises(ValueError, match="the nodes hold 1 of 3 replicas with 1 CPUs"):
        driver.collect(str(tmp_path / "run"), data=config.data, model=config.model, capture=CaptureConfig(),
                       launch=launch)  # fmt: skip
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("worker")
def test_progress_is_exported_as_metrics_of_the_cluster(tmp_path, job, head):
    config, quiet = job
    watched = Watched(tmp_path, config, cpus_per_replica=1)
    watched.collect(pause=0.0)
    port = head.head_node.metrics_export_port
    tokens = sum(commit.tokens for commit in quiet.commits())

    def exported() -> dict[str, float]:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        lines = [line for line in text.splitlines() if line.startswith("ray_collector_") and 'run="run"' in line]
        return {line.partition("{")[0] + state(line): float(line.rpartition(" ")[2]) for line in lines}

    def state(line: str) -> str:
        return ":" + line.partition('state="')[2].partition('"')[0] if 'state="' in line else ""

    wait_for(lambda: exported().get("ray_collector_shards:committed") == SHARDS)
    found = exported()
    assert found["ray_collector_tokens_total"] >= tokens, "runs of one name add up"
    assert found["ray_collector_shards:waiting"] == found["ray_collector_shards:failed"] == 0
    assert found["ray_collector_replicas:ready"] == 0
    assert 0 < found["ray_collector_padding_efficiency"] <= 1
    assert 0 <= found["ray_collector_replica_idle_share"] <= 1
