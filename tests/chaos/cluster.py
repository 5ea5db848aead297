"""A Ray cluster of several nodes on this machine, each in processes of its own, started as an operator starts them."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Self

import psutil

if TYPE_CHECKING:
    from collections.abc import Mapping


class Cluster(contextlib.ExitStack):
    """A head without CPUs; nodes with one CPU each come by `add_node`. The context ends them all."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        super().__init__()
        self.environment = environment
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"

    def __enter__(self) -> Self:
        super().__enter__()
        port = self.address.partition(":")[2]
        self._start("--head", "--port", port, "--num-cpus", "0", "--include-dashboard", "false")
        return self

    def add_node(self) -> subprocess.Popen:
        """Another node; returns when it has joined."""
        return self._start("--address", self.address, "--num-cpus", "1")

    def raylet(self, node: subprocess.Popen) -> psutil.Process:
        """The process that a node stands and falls with."""
        children = psutil.Process(node.pid).children(recursive=True)
        return next(child for child in children if child.name() == "raylet")

    def _start(self, *flags: str) -> subprocess.Popen:
        command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--object-store-memory", "100000000"]
        node = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                env=self.environment)  # fmt: skip
        self.callback(_end, node)
        assert node.stdout is not None
        lines = []
        for line in node.stdout:
            lines.append(line)
            if "Ray runtime started" in line:
                return node
        raise AssertionError(f"a node did not come up: {''.join(lines)}")


def _end(node: subprocess.Popen) -> None:
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        family = psutil.Process(node.pid).children(recursive=True)
    node.terminate()
    node.communicate(timeout=60)
    for left in psutil.wait_procs(family, timeout=10)[1]:
        with contextlib.suppress(psutil.Error):
            left.kill()
