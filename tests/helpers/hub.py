"""A hub on this machine: repositories with branches, as far as the client asks for them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
from huggingface_hub import constants

Branches = Mapping[str, Path]
"""Branch -> the folder with its files."""


class LocalHub:
    """What is served, and what was asked for."""

    def __init__(self, repositories: Mapping[str, Branches]) -> None:
        self.repositories = repositories
        self.sent: list[tuple[str, str]] = []
        """Branch and name of every file that was downloaded, in order."""

    @staticmethod
    @contextlib.contextmanager
    def unreachable() -> Iterator[None]:
        """The client works offline."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(constants, "HF_HUB_OFFLINE", True)
            yield

    @staticmethod
    def commit(branch: str) -> str:
        """The commit that a branch names."""
        return hashlib.sha1(branch.encode()).hexdigest()

    def branch(self, repository: str, revision: str) -> str | None:
        """The branch of a name or commit."""
        branches = self.repositories.get(repository, {})
        return next((name for name in branches if revision in (name, self.commit(name))), None)


def _handler(hub: LocalHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0])
            if match := re.fullmatch(r"/api/models/(.+)/refs", path):
                self._refs(match[1])
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._file(*match.groups())
            else:
                self._answer(404, b"", **{"X-Error-Code": "EntryNotFound"})

        def _refs(self, repository: str) -> None:
            if repository not in hub.repositories:
                self._answer(404, b"", **{"X-Error-Code": "RepoNotFound"})
                return
            refs = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": hub.commit(name)}
                for name in hub.repositories[repository]
            ]
            self._answer(200, json.dumps({"branches": refs, "tags": [], "converts": []}).encode())

        def _file(self, repository: str, revision: str, name: str) -> None:
            branch = hub.branch(repository, revision)
            if branch is None:
                self._answer(404, b"", **{"X-Error-Code": "RevisionNotFound"})
                return
            file = hub.repositories[repository][branch] / name
            commit = {"X-Repo-Commit": hub.commit(branch)}
            if not file.is_file():
                self._answer(404, b"", **commit, **{"X-Error-Code": "EntryNotFound"})
                return
            content = file.read_bytes()
            if self.command == "GET":
                hub.sent.append((branch, name))
            self._answer(200, content, **commit, ETag=f'"{hashlib.sha256(content).hexdigest()}"')

        def _answer(self, status: int, content: bytes, **headers: str) -> None:
            self.send_response(status)
            for header, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(header, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@contextlib.contextmanager
def local_hub(repositories: Mapping[str, Branches], cache: Path) -> Iterator[LocalHub]:
    """Serves repositories to the client of the hub in this process, which keeps them in `cache`."""
    hub = LocalHub(repositories)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    at = f"http://127.0.0.1:{server.server_port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", at)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", at + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
