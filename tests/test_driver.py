"""Whole runs through Ray: what dies on the way is replaced, and the content is that of a quiet run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from collector import driver
from collector.config import CaptureConfig, DataConfig, LaunchConfig, ModelConfig
from collector.storage import SUCCESS, RunDirectory
from tests.runs import assert_same_content, collect_here, run_config, write_jsonl

pytestmark = pytest.mark.ray

DOCUMENTS, PER_SHARD = 800, 5


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_folder):
    """Settings of an 80-shard run, and the same run undisturbed, in process."""
    folder = tmp_path_factory.mktemp("job")
    data = DataConfig(data=(str(write_jsonl(folder / "texts.jsonl", DOCUMENTS)),), docs_per_shard=PER_SHARD)
    model = ModelConfig(model=str(tiny_folder))
    quiet = collect_here(folder / "quiet", run_config(data, model), threads=1)
    return data, model, quiet


def replicas_of(process: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in process.children(recursive=True):
        try:
            if child.cmdline() and child.cmdline()[0].startswith("ray::ReplicaActor"):
                found.append(child)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until_gone(family: list[psutil.Process], timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    # A zombie has ended; it waits for a parent that may be gone.
    while left := [p for p in family if _runs(p)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def wait_for_commits(root: Path, count: int, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while len(RunDirectory(root).committed_shards()) < count:
        assert time.monotonic() < deadline, "no commit in time"
        time.sleep(0.02)


def command(job, root: Path) -> list[str]:
    data, model, _ = job
    return [sys.executable, "-m", "collector", "collect", "--out", str(root), "--data", *data.data,
            "--model", model.model, "--docs-per-shard", str(PER_SHARD), "--replicas", "1",
            "--cpus-per-replica", "1"]  # fmt: skip


def test_killed_replicas_lose_and_repeat_nothing(tmp_path, job):
    data, model, quiet = job
    root = tmp_path / "run"
    killed = []

    def kill_while_loading_and_twice_at_work():
        for commits in (0, 3, 20):
            wait_for_commits(root, commits)
            while not (replicas := replicas_of(psutil.Process())):
                time.sleep(0.02)
            replicas[0].send_signal(signal.SIGKILL)
            killed.append(replicas[0].pid)

    killer = threading.Thread(target=kill_while_loading_and_twice_at_work)
    killer.start()
    run = driver.collect(str(root), data=data, model=model, capture=CaptureConfig(),
                         launch=LaunchConfig(replicas=1, cpus_per_replica=1))  # fmt: skip
    killer.join()
    assert len(set(killed)) == 3
    assert (root / SUCCESS).exists()
    assert_same_content(run, quiet)
    assert run.failures() == {}


@pytest.mark.parametrize(("sign", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_an_interrupted_driver_leaves_a_resumable_run_and_no_process(tmp_path, job, sign, status):
    root = tmp_path / "run"
    process = subprocess.Popen(command(job, root), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_commits(root, 2)
    replicas = replicas_of(psutil.Process(process.pid))
    assert replicas
    # A killed driver ends nobody: Ray's own agents notice it in their own time.
    family = replicas if sign == signal.SIGKILL else psutil.Process(process.pid).children(recursive=True)
    process.send_signal(sign)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    wait_until_gone(family)
    before = RunDirectory(root).committed_shards()
    assert 0 < len(before) < DOCUMENTS // PER_SHARD
    assert not (root / SUCCESS).exists()

    attempts = {commit.shard: commit.attempt for commit in RunDirectory(root).commits()}
    resumed = subprocess.run(command(job, root), capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert "complete" in resumed.stdout
    run = RunDirectory(root)
    assert {c.shard: c.attempt for c in run.commits() if c.shard in attempts} == attempts, "done shards stay"
    assert_same_content(run, job[2])


def test_a_shard_that_cannot_be_read_is_left_out_named_and_the_status_says_so(tmp_path, job):
    data, model, quiet = job
    source = tmp_path / "texts.jsonl"
    source.write_bytes(Path(data.data[0]).read_bytes())
    moved = DataConfig(data=(str(source),), docs_per_shard=PER_SHARD)
    root = tmp_path / "run"
    launch = LaunchConfig(replicas=1, cpus_per_replica=1, max_attempts=2)

    def spoil_the_source():
        wait_for_commits(root, 10)
        source.write_bytes(source.read_bytes()[:-100])

    spoiler = threading.Thread(target=spoil_the_source)
    spoiler.start()
    run = driver.collect(str(root), data=moved, model=model, capture=CaptureConfig(), launch=launch)
    spoiler.join()
    failures = run.failures()
    assert failures
    assert set(failures) == set(range(DOCUMENTS // PER_SHARD)) - run.committed_shards()
    assert not (root / SUCCESS).exists()
    failure = next(iter(failures.values()))
    assert failure["attempts"] == 2
    assert "source changed" in failure["error"]
    status = subprocess.run([sys.executable, "-m", "collector", "status", str(root)], capture_output=True, text=True,
                            check=False)  # fmt: skip
    assert status.returncode == 1
    assert f"shard {min(failures)} failed" in status.stdout
    assert quiet.failures() == {}


def test_another_plan_is_refused_and_the_fields_named(tmp_path, job):
    root = tmp_path / "run"
    process = subprocess.run([*command(job, root), "--limit", "20"], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    other = subprocess.run([*command(job, root), "--limit", "30", "--max-length", "64"], capture_output=True, text=True,
                           check=False)  # fmt: skip
    assert other.returncode == 2
    assert "--limit was 20, is now 30" in other.stderr
    assert "--max-length was 512, is now 64" in other.stderr


@pytest.fixture
def cluster_address():
    """A Ray head that somebody else started, with two CPUs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = ["start", "--head", "--block", "--port", str(port), "--num-cpus", "2", "--include-dashboard", "false"]
    head = subprocess.Popen([Path(sys.executable).parent / "ray", *start], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)  # fmt: skip
    assert any("Ray runtime started" in line for line in head.stdout), "the head did not come up"
    yield f"127.0.0.1:{port}"
    assert head.poll() is None, "the cluster outlives the runs that joined it"
    family = psutil.Process(head.pid).children(recursive=True)
    head.terminate()
    head.communicate(timeout=60)
    for left in psutil.wait_procs(family, timeout=10)[1]:
        left.kill()


def test_two_replicas_on_a_cluster_that_was_there_before(tmp_path, job, cluster_address):
    root = tmp_path / "run"
    arguments = [*command(job, root), "--replicas", "2", "--ray-address", cluster_address]
    process = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert_same_content(RunDirectory(root), job[2])


def test_a_cluster_without_gpus_says_so(tmp_path, job):
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        pytest.skip("this machine has GPUs")
    process = subprocess.run([*command(job, tmp_path / "run"), "--device", "cuda"], capture_output=True, text=True,
                             check=False)  # fmt: skip
    assert process.returncode == 2
    assert "Ray sees no GPU" in process.stderr


def test_a_model_that_cannot_be_loaded_is_one_clear_line(tmp_path, job):
    arguments = command(job, tmp_path / "run")
    arguments[arguments.index("--model") + 1] = str(tmp_path)
    process = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert f"cannot load --model '{tmp_path}'" in process.stderr
    assert "Traceback" not in process.stderr
