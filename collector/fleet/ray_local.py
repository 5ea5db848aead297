"""Starts a Ray on this machine, for one run, also where its home and its folder for temporary files are of no use."""

from __future__ import annotations

import logging
import os
import secrets
import sys
import tempfile
from pathlib import Path

import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private.authentication.authentication_token_setup import generate_and_save_token
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

OBJECT_STORE_BYTES = 100 * 2**20
"""Bytes of the object store of a local Ray, through which only small reports pass."""
_LONGEST_SOCKET = 103 if sys.platform == "darwin" else 107
_SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""A socket's path below the folder for temporary files."""


def start() -> None:
    """Starts a Ray that ends with `ray.shutdown`, without dashboard.

    Raises:
        ValueError: it has no folder for its temporary files; names the variable that gives it another.
        RuntimeError: it does not start.
    """
    _provide_token()
    folder = _temporary_folder()
    try:
        ray.init(
            "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=folder,
        )
    except Exception as error:
        why = " ".join(str(error).split())
        raise RuntimeError(f"Ray does not start on this machine, its logs are in {folder}: {why}") from error


def _provide_token() -> None:
    """Has Ray find a token, in the environment of this run alone where it cannot be kept in the home folder."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return
    if not AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
        try:
            generate_and_save_token()
        except (OSError, RuntimeError):
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _temporary_folder() -> str:
    """Returns Ray's own folder for temporary files; if TMPDIR makes that useless, one in /tmp.

    Raises:
        ValueError: it is useless for a Ray.
    """
    folder = get_default_ray_temp_dir()
    problem = _problem(folder)
    if problem and "RAY_TMPDIR" not in os.environ:
        folder = f"/tmp/ray-{os.getuid()}"
        problem = _problem(folder)
    if problem:
        raise ValueError(
            f"Ray cannot keep its temporary files in {folder}: {problem}; set RAY_TMPDIR to a folder that you may "
            f"write to, with a short path in ASCII, for example RAY_TMPDIR=/tmp/ray-{os.getuid()}"
        )
    return folder


def _problem(folder: str) -> str | None:
    """Returns why Ray cannot use a folder, or None if it can."""
    if not folder.isascii():
        return "Ray takes paths in ASCII only"
    if (length := len(folder + _SOCKET)) > _LONGEST_SOCKET:
        return f"the paths of its sockets would have {length} characters, and may have {_LONGEST_SOCKET}"
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return str(error.strerror or error)
