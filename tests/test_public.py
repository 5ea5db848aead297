"""What is public can be imported from `collector`, and nothing heavy is imported before it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import collector


def test_every_public_name_is_there():
    assert dir(collector) == sorted(collector.__all__)
    assert all(getattr(collector, name) is not None for name in collector.__all__)
    with pytest.raises(AttributeError, match="no attribute 'anything'"):
        collector.anything  # noqa: B018


def test_queries_are_asked_without_torch_and_the_package_imports_next_to_nothing():
    program = (
        "import sys, collector\n"
        "heavy = {'torch', 'ray', 'transformers', 'duckdb', 'pyarrow'}\n"
        "assert not heavy & set(sys.modules)\n"
        "collector.open_run, collector.list_queries()\n"
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
