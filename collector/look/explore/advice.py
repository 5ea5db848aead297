"""What to do before a large run is looked at: count it once, so that no view counts it again."""

from __future__ import annotations

import shlex

from collector.query.rollup import files as rollups
from collector.store.run_directory import RunDirectory

LARGE = 1_000_000
"""Tokens from which on a step between layers without a rollup takes seconds."""


def slow(root: str) -> str:
    """Why views of a run will be slow and which command helps, in Markdown; empty where they are not.

    Args:
        root: the run directory.

    Raises:
        FileNotFoundError: there is no run.
    """
    run, covered, tokens = RunDirectory(root), rollups.Covered(), 0
    for commit in run.commits():
        covered.add(commit)
        tokens += commit.tokens
    if tokens < LARGE or rollups.find(run, covered):
        return ""
    return (
        f"{tokens:,} tokens and no current rollup: each step between layers counts them all. "
        f"Count them once: `collector rollup {shlex.quote(root)}`, then start again."
    )
