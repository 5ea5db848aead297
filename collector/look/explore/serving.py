"""Starts the explorer: a marimo server on the loopback address, protected by a token.

Guarantees: it listens on 127.0.0.1 only; the token is new each time, 128 random bits, and appears only in the printed
URL, never in the list of processes. The server ends with this process.
"""

from __future__ import annotations

import contextlib
import importlib.util
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from collector.look.explore import advice
from collector.query import warehouse

if TYPE_CHECKING:
    from collections.abc import Iterator

HOST = "127.0.0.1"
_START_SECONDS = 60.0


def app_file() -> Path:
    """Returns the path of the app: in `notebooks/` of an installed package, else of a checkout."""
    installed = Path(__file__).parents[2] / "notebooks" / "explore.py"
    return installed if installed.is_file() else Path(__file__).parents[3] / "notebooks" / "explore.py"


@contextlib.contextmanager
def served(run: str, port: int = 0) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Runs a server for the duration of the context.

    Args:
        run: the run directory.
        port: port to listen on; 0 takes any free one.

    Yields:
        The URL with the token, and the server, ready to answer.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: the run cannot be opened or is empty, the port is taken, or marimo is missing.
    """
    if not warehouse.open_run(run).sql("select 1 from documents limit 1").fetchall():
        raise ValueError(f"{run} has no document yet: collector status {run} shows its progress")
    for module in ("marimo", "anywidget"):
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"the explorer needs {module}: pip install 'moe-routing-collector[explore]'")
    port, token = _free(port), secrets.token_urlsafe(16)
    location = run if "://" in run else str(Path(run).absolute())
    command = [
        sys.executable, "-m", "marimo", "--quiet", "--yes", "run", str(app_file()), "--host", HOST, "--port", str(port),
        "--headless", "--no-check", "--no-sandbox", "--token", "--token-password-file", "-", "--", "--run", location,
    ]  # fmt: skip
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdin is not None
            server.stdin.write(token)
            server.stdin.close()
            _await(server, port)
            yield f"http://{HOST}:{port}/?access_token={token}", server
        finally:
            server.terminate()


def serve(run: str, port: int, *, browser: bool) -> None:
    """Serves a run until Ctrl-C.

    Args:
        run: the run directory.
        port: port to listen on; 0 takes any free one.
        browser: whether to open the page.
    """
    if hint := advice.slow(run):
        sys.stderr.write(f"{hint}\n")
    with served(run, port) as (url, server):
        sys.stdout.write(f"{url}\nCtrl-C ends it. The address bar holds the view: copy it to share what you see.\n")
        sys.stdout.flush()
        if browser:
            import webbrowser

            webbrowser.open(url)
        server.wait()


def _free(port: int) -> int:
    """Returns the port, or any free one for 0, after checking that it can be bound."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ValueError(f"--port {port} cannot be listened on: {error}; leave it out, or take another") from error
        return int(probe.getsockname()[1])


def _await(server: subprocess.Popen[str], port: int) -> None:
    """Waits until the server listens."""
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until:
        if server.poll() is not None:
            raise ValueError(f"marimo ended with status {server.returncode}; see its messages above")
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
            return
        time.sleep(0.05)
    raise ValueError(f"marimo did not answer in {_START_SECONDS:.0f} s")
