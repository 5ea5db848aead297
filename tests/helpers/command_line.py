"""The command line in this process: what a process of its own would do, without importing torch and Ray once more."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from collector import __main__ as cli


def exit_status(*arguments: str) -> int:
    """Runs a command, which writes where the test does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["collector", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
    return end.value.code


def collector(*arguments: str, stdin: str = "", text: bool = True) -> subprocess.CompletedProcess:
    """Runs a command; standard output and error are decoded, or bytes."""
    out, errors = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    replaced = {"stdin": io.StringIO(stdin), "stdout": out, "stderr": errors}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in replaced.items():
            patch.setattr(sys, name, value)
        status = exit_status(*arguments)
    said = [stream.buffer.getvalue() for stream in (out, errors)]
    return subprocess.CompletedProcess(arguments, status, *(s.decode() if text else s for s in said))
