"""Collects the routing of Mixture-of-Experts models over whole datasets, and answers questions about it in SQL.

    from collector import open_run, open_runs, open_sweep

    run = open_run("runs/demo")
    run.query("domain_specialization", layer=5).df()
    open_runs("runs/demo", "runs/demo-random").query("router_saturation").df()
    open_sweep("runs/sweep-demo").query("mutual_information").df()

Public are the names in `__all__`, `collector.config`, the command line, the files of a run and the SQL views over them.
Everything else may change from one version to the next.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collector.fleet.driver import collect_in_process
    from collector.query import inference
    from collector.query.catalog import list_comparisons, list_queries
    from collector.query.comparison import open_runs
    from collector.query.document_counts import document_counts
    from collector.query.interventions import prepare_intervention
    from collector.query.sweeps import open_sweep
    from collector.query.warehouse import committed_files, open_run

__all__ = [
    "collect_in_process",
    "committed_files",
    "document_counts",
    "inference",
    "list_comparisons",
    "list_queries",
    "open_run",
    "open_runs",
    "open_sweep",
    "prepare_intervention",
]

_FUNCTIONS = {
    "collect_in_process": "collector.fleet.driver",
    "committed_files": "collector.query.warehouse",
    "document_counts": "collector.query.document_counts",
    "list_comparisons": "collector.query.catalog",
    "list_queries": "collector.query.catalog",
    "open_run": "collector.query.warehouse",
    "open_runs": "collector.query.comparison",
    "open_sweep": "collector.query.sweeps",
    "prepare_intervention": "collector.query.interventions",
}
_MODULES = {"inference": "collector.query.inference"}


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `collector --help` starts at once."""
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, for completion."""
    return sorted(__all__)
