"""Collects the routing of Mixture-of-Experts models over whole datasets, and answers in SQL.

from collector import open_run, open_runs

run = open_run("runs/demo")
run.query("domain_specialization", layer=5).df()
open_runs("runs/demo", "runs/demo-random").query("router_saturation").df()
"""

from __future__ import annotations

from typing import Any

__all__ = ["committed_files", "open_run", "open_runs"]


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `collector --help` starts at once."""
    if name == "open_run":
        from collector.query.warehouse import open_run

        return open_run
    if name == "open_runs":
        from collector.query.comparison import open_runs

        return open_runs
    if name == "committed_files":
        from collector.query.warehouse import committed_files

        return committed_files
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
