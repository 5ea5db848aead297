"""Joins a Ray cluster, or starts a local one that ends with the run."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import TYPE_CHECKING, Literal

import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

from collector.fleet import ray_address, ray_local
from collector.fleet.placement import Node

if TYPE_CHECKING:
    from collections.abc import Iterator

    from collector.config import LaunchConfig
    from collector.fleet.ray_address import Address


@contextlib.contextmanager
def cluster(launch: LaunchConfig) -> Iterator[bool]:
    """Joins the cluster that was named, or starts a local Ray and ends it afterwards.

    Yields:
        Whether the cluster may get more nodes; a local Ray does not.

    Raises:
        ValueError: the address is of no use, a local Ray has no place for its temporary files, or the command line is
            not UTF-8.
        RuntimeError: Ray does not start, or cannot be joined.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would announce here that future versions leave the GPUs visible to actors without any.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield True
        return
    _require_utf8(sys.argv)
    address = ray_address.chosen(launch)
    if address is None:
        ray_local.start()
    else:
        _join(address)
    try:
        yield address is not None
    finally:
        ray.shutdown()


def _require_utf8(command: list[str]) -> None:
    """Refuses a command line that Ray could not note."""
    for word in command:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{word!a} is not in UTF-8, as Ray needs it: rename it, or set a locale with UTF-8 (LC_ALL=C.UTF-8)"
            ) from error


def _join(address: Address) -> None:
    """Joins a cluster if a Ray answers there."""
    # Ray starts clusters with a token where there is one, but joins by address without, unless told.
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    ray_address.require_answer(address)
    try:
        ray.init(address.given, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        why = " ".join(str(error).split())
        raise RuntimeError(f"{address.origin}: a Ray answers there, but cannot be joined: {why}") from error


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
