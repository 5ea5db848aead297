"""The command line in this process: what a process of its own would do, without importing torch and Ray once more."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from collector import __main__ as cli


def collector(*arguments: str, stdin: str = "", text: bool = True) -> subprocess.CompletedProcess:
    """Runs a command; standard output and error are decoded, or bytes."""
    out, errors = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    replaced = {"argv": ["collector", *arguments], "stdin": io.StringIO(stdin), "stdout": out, "stderr": errors}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in replaced.items():
            patch.setattr(sys, name, value)
        with pytest.raises(SystemExit) as end:
            cli.main()
    said = [stream.buffer.getvalue() for stream in (out, errors)]
    return subprocess.CompletedProcess(arguments, end.value.code, *(s.decode() if text else s for s in said))
