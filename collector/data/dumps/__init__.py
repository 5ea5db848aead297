"""Reads routing that other programs dumped: SGLang, vLLM, and FLAME-MoE-Traces.

A `Dump` says which documents there are, which routers, and what its format does not have; it yields the documents of a
shard as arrays. `replica.importing` makes a run of it.

To add a format, subclass `Dump` and enter the class in `open_dump`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from collector.data.dumps.base import NO_PROMPTS, Cut, Dump, Dumped, Router
from collector.data.dumps.flame import Flame
from collector.data.dumps.sglang import Recorder, SglangResponses, is_recorder
from collector.data.dumps.vllm import VllmResponses

if TYPE_CHECKING:
    from collector.config import DumpKind, ImportConfig

__all__ = ["NO_PROMPTS", "Cut", "Dump", "Dumped", "Router", "open_dump"]


def open_dump(location: str, kind: DumpKind, config: ImportConfig) -> Dump:
    """Returns the reader of a dump; reads nothing of it yet but names and first bytes.

    Args:
        location: file, folder or glob.
        kind: what wrote it.
        config: what is known of it.

    Raises:
        ValueError: there is no such dump, or a setting that its format needs is missing.
    """
    if kind == "flame":
        return Flame(location, config)
    if kind == "vllm":
        return VllmResponses(location, config)
    return Recorder(location, config) if is_recorder(location) else SglangResponses(location, config)
