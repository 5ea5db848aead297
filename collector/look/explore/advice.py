"""Advises making a rollup before exploring a large run, so that its tokens are counted only once."""

from __future__ import annotations

import shlex

from collector.query.rollup import files as rollups
from collector.store.run_directory import RunDirectory

LARGE = 1_000_000
"""From this number of tokens on, switching layers takes seconds without a rollup."""


def slow(root: str) -> str:
    """Explains in Markdown why views of a run will be slow and which command helps; empty if they are fast.

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
