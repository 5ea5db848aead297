"""Joins a Ray cluster, or starts a local one that ends with the run."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING, Any, Literal

import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

from collector.fleet.placement import Node

if TYPE_CHECKING:
    from collections.abc import Iterator

    from collector.config import LaunchConfig

OBJECT_STORE_BYTES = 100 * 2**20
"""Bytes of the object store of a local Ray, through which only small reports pass."""


@contextlib.contextmanager
def cluster(launch: LaunchConfig) -> Iterator[bool]:
    """Joins the cluster that was named, or starts a local Ray and ends it afterwards.

    Yields:
        Whether the cluster may get more nodes; a local Ray does not.
    """
    address = launch.ray_address or os.environ.get("RAY_ADDRESS") or "local"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would announce here that future versions leave the GPUs visible to actors without any.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if ray.is_initialized():
        yield True
        return
    if address != "local":
        # Ray starts clusters with a token where there is one, but joins by address without, unless told.
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    local: dict[str, Any] = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **(local if address == "local" else {}))
    try:
        yield address != "local"
    finally:
        ray.shutdown()


def alive_nodes() -> list[Node]:
    """The nodes of the cluster that are alive."""
    return [Node.of(entry) for entry in ray.nodes() if entry["Alive"]]


def pick_device(launch: LaunchConfig, *, grows: bool = False) -> Literal["cpu", "cuda"]:
    """Chooses `cuda` if it was asked for or the cluster has GPUs.

    Args:
        launch: the device, and how many replicas must fit at the start.
        grows: whether the cluster may get more nodes.

    Raises:
        ValueError: GPUs are asked for, the cluster has none, and the run does not wait for nodes.
    """
    gpus = any(node.gpus for node in alive_nodes())
    may_wait = grows and launch.replica_range()[0] == 0
    if launch.device == "cuda" and not gpus and not may_wait:
        raise ValueError("--device cuda: Ray sees no GPU; use --device cpu, join a cluster with --ray-address, or wait "
                         "for its GPUs with --replicas 0:MAX")  # fmt: skip
    if launch.device == "auto":
        return "cuda" if gpus else "cpu"
    return launch.device
