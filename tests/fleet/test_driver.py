"""Whole runs through Ray: what dies on the way is replaced, and the content is that of a quiet run."""

from __future__ import annotations

import dataclasses
import json
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
import ray

from collector.config import CaptureConfig, DataConfig, LaunchConfig, ModelConfig
from collector.fleet import driver
from collector.store.run_directory import SUCCESS, RunDirectory
from tests.helpers.command_line import collector
from tests.helpers.runs import assert_same_content, collect_here, run_config, write_jsonl

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


def collecting(job, root: Path) -> list[str]:
    """Arguments of the collector."""
    data, model, _ = job
    return ["collect", "--out", str(root), "--data", *data.data, "--model", model.model,
            "--docs-per-shard", str(PER_SHARD), "--replicas", "1", "--cpus-per-replica", "1"]  # fmt: skip


def launch(arguments: list[str], **environment: str) -> subprocess.Popen:
    """A driver in a process of its own, with a Ray of its own unless the arguments name another."""
    return subprocess.Popen([sys.executable, "-m", "collector", *arguments], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=os.environ | environment)  # fmt: skip


@pytest.mark.usefixtures("local_ray")
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


@pytest.mark.usefixtures("local_ray")
def test_an_interrupted_driver_leaves_a_resumable_run_and_no_process(tmp_path, job):
    """Three drivers of one run, each ended in another way; a fourth ends the run."""
    root = tmp_path / "run"
    done: dict[int, str] = {}
    for sign, status in ((signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)):
        process = launch(collecting(job, root))
        wait_for_commits(root, len(done) + 2)
        replicas = replicas_of(psutil.Process(process.pid))
        assert replicas
        # A killed driver ends nobody: Ray's own agents notice it in their own time.
        family = replicas if sign == signal.SIGKILL else psutil.Process(process.pid).children(recursive=True)
        process.send_signal(sign)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == status, errors
        assert "Traceback" not in errors
        wait_until_gone(family)
        now = {commit.shard: commit.attempt for commit in RunDirectory(root).commits()}
        assert now.items() > done.items(), "done shards stay"
        assert len(now) < DOCUMENTS // PER_SHARD
        assert not (root / SUCCESS).exists()
        done = now
    resumed = collector(*collecting(job, root))
    assert resumed.returncode == 0, resumed.stderr
    assert "complete" in resumed.stdout
    run = RunDirectory(root)
    assert {commit.shard: commit.attempt for commit in run.commits()}.items() > done.items()
    assert_same_content(run, job[2])


@pytest.mark.usefixtures("local_ray")
def test_a_shard_that_cannot_be_read_is_left_out_and_told_until_it_is_tried_again(tmp_path, job):
    data, model, quiet = job
    source, root = tmp_path / "texts.jsonl", tmp_path / "run"
    whole = Path(data.data[0]).read_bytes()
    source.write_bytes(whole)
    stamp = source.stat()
    arguments = collecting((dataclasses.replace(data, data=(str(source),)), model, quiet), root)
    arguments += ["--max-attempts", "2", "--log-format", "json"]

    def spoil_the_source():
        wait_for_commits(root, 10)
        source.write_bytes(whole[:-100])

    spoiler = threading.Thread(target=spoil_the_source)
    spoiler.start()
    first = launch(arguments)
    said, errors = first.communicate(timeout=300)
    spoiler.join()
    assert first.returncode == 1, errors
    run = RunDirectory(root)
    failures = run.failures()
    assert failures
    assert set(failures) == set(range(DOCUMENTS // PER_SHARD)) - run.committed_shards()
    assert not (root / SUCCESS).exists()
    failure = failures[min(failures)]
    assert (failure["attempts"], failure["left_out"], failure["node"]) == (2, True, socket.gethostname())
    assert "source changed" in failure["error"]
    assert f"shard {min(failures)} failed after 2 attempts, left out" in said
    assert "raise ValueError" in said, "with its traceback"
    events = [json.loads(line) for line in errors.splitlines()]
    told = [event for event in events if event["event"] == "shard_failed" and event["shard"] == min(failures)]
    assert [(event["attempt"], event["left_out"]) for event in told] == [(1, False), (2, True)]
    assert all(event["time"] and "source changed" in event["error"] for event in told)
    assert events[-1]["event"] == "progress"
    assert events[-1]["shards_failed"] == len(failures)

    source.write_bytes(whole)
    os.utime(source, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    again = collector(*arguments)
    assert again.returncode == 1, "what was left out stays out"
    assert [json.loads(line)["event"] for line in again.stderr.splitlines()].count("shard_left_out") == len(failures)
    assert set(run.failures()) == set(failures)
    retried = collector(*arguments, "--retry-failed")
    assert retried.returncode == 0, retried.stderr
    assert run.failures() == {}
    assert_same_content(run, quiet)


@pytest.mark.usefixtures("local_ray")
def test_another_plan_is_refused_and_the_fields_named(tmp_path, job):
    data, model, _ = job
    collect_here(tmp_path / "run", run_config(dataclasses.replace(data, limit=20), model))
    other = collector(*collecting(job, tmp_path / "run"), "--limit", "30", "--max-length", "64")
    assert other.returncode == 2
    assert "--limit was 20, is now 30" in other.stderr
    assert "--max-length was 512, is now 64" in other.stderr


@pytest.fixture
def cluster_address(monkeypatch):
    """A Ray head that somebody else started, with two CPUs and a token, which is in the environment."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "ab" * 32)
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
    arguments = [*collecting(job, root), "--replicas", "2", "--ray-address", cluster_address]
    older = "import ray; ray.__version__ = '2.59.0'; from collector.__main__ import main; main()"
    process = subprocess.run([sys.executable, "-c", older, *arguments], capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr == (
        f"collector: --ray-address {cluster_address}: the cluster runs Ray {ray.__version__}, and this is Ray 2.59.0; "
        "install the same version on all nodes\n"
    )
    stranger = launch(arguments, RAY_AUTH_TOKEN="cd" * 32)
    _, errors = stranger.communicate(timeout=60)
    assert stranger.returncode == 2
    assert errors == (
        f"collector: --ray-address {cluster_address}: the cluster refuses the token: set RAY_AUTH_TOKEN, or "
        "RAY_AUTH_TOKEN_PATH, to that of the cluster\n"
    )
    process = launch(arguments)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert_same_content(RunDirectory(root), job[2])


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_cluster_without_gpus_says_so(tmp_path, job, log_format):
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        pytest.skip("this machine has GPUs")
    done = collector(*collecting(job, tmp_path / "run"), "--device", "cuda", "--log-format", log_format)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    said = json.loads(line) if log_format == "json" else {"event": "error", "message": line}
    assert said["event"] == "error"
    assert "Ray sees no GPU" in said["message"]


@pytest.mark.usefixtures("local_ray")
def test_a_model_that_cannot_be_loaded_is_one_clear_line(tmp_path, job):
    arguments = collecting(job, tmp_path / "run")
    arguments[arguments.index("--model") + 1] = str(tmp_path)
    done = collector(*arguments)
    assert done.returncode == 2
    assert f"--model {tmp_path}: the folder has no config.json" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("local_ray")
def test_data_that_is_not_there_is_one_clear_line(tmp_path):
    done = collector("collect", "--out", str(tmp_path / "run"), "--data", "/no/such/*.jsonl")
    assert done.returncode == 2
    assert "/no/such/*.jsonl" in done.stderr
    assert "Traceback" not in done.stderr
