"""A real autoscaler follows the replicas that a run asks for, and takes the nodes back when the work is done.

Ray's own provider of nodes on this machine (`fake_multinode`) stands for a cloud; everything else is what runs there.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from collector.config import DataConfig, ModelConfig
from collector.store.run_directory import SUCCESS, RunDirectory
from tests.helpers.runs import assert_same_content, collect_here, run_config, write_jsonl

pytestmark = [pytest.mark.ray, pytest.mark.slow]

HEAD = "f" * 51 + "00000"
NOTHING = {name: [] for name in (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands", "cluster_synced_files",
    "head_start_ray_commands", "worker_start_ray_commands", "rsync_exclude", "rsync_filter")}  # fmt: skip


def cluster_of(port: int, workers: int) -> dict:
    """A head without cores, and up to so many workers with one each that go after six seconds without work."""
    return NOTHING | {
        "cluster_name": "here", "max_workers": workers, "upscaling_speed": 20, "idle_timeout_minutes": 0.1,
        "provider": {"type": "fake_multinode", "gcs_address": f"127.0.0.1:{port}", "head_node_id": HEAD,
                     "use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True},
        "auth": {}, "file_mounts": {}, "file_mounts_sync_continuously": False, "docker": {},
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": {"CPU": 1, "object_store_memory": 100 * 2**20}, "node_config": {},
                       "min_workers": 0, "max_workers": workers},
        },
    }  # fmt: skip


@pytest.fixture
def autoscaling(tmp_path):
    """Address of a cluster of nothing but a head, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config, log = tmp_path / "cluster.yaml", tmp_path / "head.log"
    config.write_text(json.dumps(cluster_of(port, 2)))
    environment = os.environ | {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                                "RAY_USAGE_STATS_ENABLED": "0", "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD}  # fmt: skip
    arguments = ["--head", "--block", "--port", str(port), "--node-ip-address", "127.0.0.1", "--num-cpus", "0",
                 "--include-dashboard", "false", "--object-store-memory", str(100 * 2**20),
                 "--autoscaling-config", str(config)]  # fmt: skip
    with log.open("w") as out:
        head = subprocess.Popen([Path(sys.executable).parent / "ray", "start", *arguments], env=environment, stdout=out,
                                stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
    try:
        wait_for(lambda: "Ray runtime started" in log.read_text())
        yield f"127.0.0.1:{port}", psutil.Process(head.pid)
    finally:
        family = psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        head.wait(timeout=60)
        for left in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()


def wait_for(condition, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)


def raylets(head: psutil.Process) -> int:
    """Nodes of the cluster, the head included."""
    found = 0
    for process in head.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            # A raylet that starts its workers is there twice for a moment.
            forked = (parent := process.parent()) is not None and parent.name() == "raylet"
            found += process.name() == "raylet" and not forked and process.status() != psutil.STATUS_ZOMBIE
    return found


def test_a_run_that_begins_without_any_node_brings_them_and_lets_them_go(tmp_path, tiny_folder, autoscaling):
    address, head = autoscaling
    texts = write_jsonl(tmp_path / "texts.jsonl", 600)
    data, model = DataConfig(data=(str(texts),), docs_per_shard=5), ModelConfig(model=str(tiny_folder))
    quiet = collect_here(tmp_path / "quiet", run_config(data, model), threads=1)
    assert raylets(head) == 1
    run = RunDirectory(tmp_path / "run")
    process = subprocess.Popen(
        [sys.executable, "-m", "collector", "collect", "--out", run.root, "--data", *data.data, "--docs-per-shard", "5",
         "--model", model.model, "--ray-address", address, "--replicas", "0:2", "--cpus-per-replica", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    nodes = []
    wait_for(lambda: nodes.append(raylets(head)) or nodes[-1] == 3 or process.poll() is not None)
    assert nodes[-1] == 3, "a node for each of the two replicas"
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert (tmp_path / "run" / SUCCESS).exists()
    assert_same_content(run, quiet)
    wait_for(lambda: raylets(head) == 1)
