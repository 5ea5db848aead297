"""Which Ray a launch joins, and whether one answers there.

Ray itself waits for minutes for an address where nothing answers, and does not say where it has the address from. So
one request goes there first, with Ray's own TLS settings and token.
"""

from __future__ import annotations

import dataclasses
import os
import time
from typing import TYPE_CHECKING, Any

import grpc
import ray
from ray._common.utils import get_ray_address_file
from ray._private import services
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc, ray_client_pb2, ray_client_pb2_grpc

if TYPE_CHECKING:
    from collector.config import LaunchConfig

PATIENCE = 10.0
"""Seconds in which an address must answer."""
_CLIENT = "ray://"
_LOCAL = "local"
_VARIABLE = "RAY_ADDRESS"
_OPTIONS = (
    ("grpc.enable_http_proxy", 0),  # Ray's own connections use none
    ("grpc.initial_reconnect_backoff_ms", 1000),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Address:
    """A cluster to join."""

    given: str
    """What `ray.init` takes: host:port or ray://host:port."""
    origin: str
    """Where it comes from, in the user's words."""

    @property
    def target(self) -> str:
        """The host:port of the request."""
        return self.given.removeprefix(_CLIENT)


def chosen(launch: LaunchConfig) -> Address | None:
    """Returns the address that a launch joins; None if it starts a Ray of its own.

    The environment variable RAY_ADDRESS says where `auto` is, as it does for Ray itself. Without it, `auto` is a Ray
    that runs on this machine, or the last one that Ray noted.

    Raises:
        ValueError: `auto`, and there is none; or the address is none.
    """
    variable = os.environ.get(_VARIABLE, "")
    wanted, origin = launch.ray_address or variable or _LOCAL, "--ray-address" if launch.ray_address else _VARIABLE
    if wanted == "auto" and variable:
        wanted, origin = variable, _VARIABLE
    if wanted == _LOCAL:
        return None
    origin = f"{origin} {wanted}"
    if wanted == "auto":
        running = services.find_gcs_addresses()
        try:
            wanted = services.get_ray_address_from_environment("auto", None)
        except ConnectionError as error:
            raise ValueError(
                f"{origin}: no Ray runs on this machine; start one with `ray start --head`, name a cluster by "
                "host:port, or leave the address out for a Ray of this run alone"
            ) from error
        origin += f" ({wanted}, {'which runs here' if running else f'as {get_ray_address_file(None)} says'})"
    address = Address(given=wanted, origin=origin)
    host, _, port = address.target.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise ValueError(f"{origin}: no address; take auto, host:port (usually port 6379) or ray://host:port (10001)")
    return address


def require_answer(address: Address) -> None:
    """Asks for a sign of life of the Ray at an address, and waits for it `PATIENCE` seconds at most.

    Raises:
        ValueError: nothing answers there, it is no Ray or one of another version, or it refuses the token.
    """
    start = time.monotonic()
    target = address.target
    if not address.given.startswith(_CLIENT):  # Ray does not listen on the loopback device
        target = services.canonicalize_bootstrap_address(target) or target
    channel = init_grpc_channel(target, options=_OPTIONS)
    try:
        while True:
            try:
                version = _ask(channel, address, start + PATIENCE - time.monotonic())
                break
            except grpc.RpcError as error:
                # A head that has just been started may not listen yet.
                if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > start + PATIENCE / 2:
                    raise ValueError(f"{address.origin}: {_explained(error)}") from error
                time.sleep(1)
    finally:
        channel.close()
    if version is not None and version != ray.__version__:
        raise ValueError(
            f"{address.origin}: the cluster runs Ray {version}, and this is Ray {ray.__version__}; install the same "
            "version on all nodes"
        )


def _ask(channel: grpc.Channel, address: Address, seconds: float) -> str | None:
    """Sends the request; returns Ray's version if the answer holds it."""
    if address.given.startswith(_CLIENT):
        messages: Any = ray_client_pb2
        ping = messages.ClusterInfoRequest(type=messages.ClusterInfoType.PING)
        ray_client_pb2_grpc.RayletDriverStub(channel).ClusterInfo(ping, timeout=seconds)
        return None
    messages = gcs_service_pb2
    stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
    return str(stub.CheckAlive(messages.CheckAliveRequest(), timeout=seconds).ray_version)


def _explained(error: grpc.RpcError) -> str:
    """What a refusal means, and what helps."""
    code, details = error.code(), str(error.details()).lower()
    way_on = "start the cluster, correct the address, or leave it out for a Ray of this run alone"
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return "the cluster refuses the token: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to that of the cluster"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return f"something answers there, but not as Ray does at this port (usually 6379, of ray:// 10001): {way_on}"
    if code is grpc.StatusCode.UNAVAILABLE and "refused" in details:
        return f"nothing listens there: {way_on}"
    if code is grpc.StatusCode.UNAVAILABLE and ("dns" in details or "name" in details):
        return f"there is no host of this name: {way_on}"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"no Ray answered within {PATIENCE:.0f} seconds: {way_on}"
    return f"no Ray answered ({code.name.lower()}: {' '.join(str(error.details()).split())[:200]}): {way_on}"
