"""Where a launch looks for Ray: an address at which no Ray answers, and a machine on which none can start."""

from __future__ import annotations

import os
import socket
import time

import pytest
from ray._private import services

from collector.fleet import ray_address
from tests.helpers.command_line import collector


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(ray_address, "PATIENCE", 2.0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def refused(*arguments: str) -> str:
    """What `collector collect` says in one line, within a few seconds."""
    before = time.monotonic()
    done = collector("collect", *arguments)
    assert done.returncode == 2
    assert time.monotonic() - before < 10
    (line,) = done.stderr.splitlines()
    return line.removeprefix("collector: ")


@pytest.fixture
def mute():
    """The port of a server that accepts connections and says nothing."""
    with socket.create_server(("", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def free():
    """A port at which nothing listens."""
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_nothing_listens(free, scheme, monkeypatch):
    address = f"{scheme}127.0.0.1:{free}"
    assert refused("--ray-address", address).startswith(f"--ray-address {address}: nothing listens there: start the")
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert refused().startswith(f"RAY_ADDRESS {address}: nothing listens there")
    assert refused("--ray-address", "auto").startswith(f"RAY_ADDRESS {address}: nothing listens there")


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_something_listens_that_is_no_ray(mute, scheme):
    address = f"{scheme}127.0.0.1:{mute}"
    assert refused("--ray-address", address).startswith(f"--ray-address {address}: no Ray answered within 2 seconds")


def test_a_name_without_a_host():
    assert "there is no host of this name" in refused("--ray-address", "nowhere.invalid:6379")


@pytest.mark.parametrize("address", ["somewhere", "host:", "http://127.0.0.1:8265"])
def test_what_is_no_address(address):
    assert refused("--ray-address", address) == (
        f"--ray-address {address}: no address; take auto, host:port (usually port 6379) or ray://host:port (10001)"
    )


@pytest.mark.ray  # so that no other test starts one meanwhile
def test_auto_says_whose_word_it_takes(free, tmp_path, monkeypatch):
    if services.find_gcs_addresses():
        pytest.skip("a Ray runs on this machine")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert refused("--ray-address", "auto").startswith("--ray-address auto: no Ray runs on this machine; start one")
    noted = tmp_path / "ray" / "ray_current_cluster"
    noted.parent.mkdir()
    noted.write_text(f"127.0.0.1:{free}")
    said = refused("--ray-address", "auto")
    assert said.startswith(f"--ray-address auto (127.0.0.1:{free}, as {noted} says): nothing listens there")


@pytest.mark.parametrize(
    ("folder", "problem"),
    [
        ("x" * 60, "the paths of its sockets would have "),
        ("é", "Ray takes paths in ASCII only"),
        ("/dev/null", "Not a directory"),
    ],
)
def test_a_folder_in_which_ray_cannot_keep_its_files(folder, problem, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / folder))
    said = refused()
    assert said.startswith(f"Ray cannot keep its temporary files in {tmp_path / folder}/ray: {problem}")
    assert f"for example RAY_TMPDIR=/tmp/ray-{os.getuid()}" in said


def test_a_command_line_that_is_not_utf_8():
    assert refused("--out", os.fsdecode(b"/tmp/\xe9t\xe9")).startswith(r"'/tmp/\udce9t\udce9' is not in UTF-8")
