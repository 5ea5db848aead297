"""Routing from elsewhere: `collector import` makes a run of what a serving engine dumped."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from typing import Annotated

import tyro

from collector.config import DumpKind, ImportConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import:
    """Make a run of routing that SGLang, vLLM or FLAME-MoE-Traces recorded: `collector import DUMP OUT --from vllm …`.

    Queries, report, export and comparisons then read it like any run: `collector query OUT router_saturation --beside
    RUN` tells whether an engine chose the experts that the model chose in a collected run. Engines return which experts
    were chosen, and nothing else: queries that need weights or router statistics refuse, and say so.

    For example: `collector import outputs.jsonl runs/served --from vllm --model allenai/OLMoE-1B-7B-0924 --experts 64`.
    The same command resumes an import that was interrupted.
    """

    dump: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DUMP")]
    """What was dumped: a file, a folder or a glob.
    JSON lines have a request in each line: of vLLM prompt_token_ids, outputs (or choices) with token_ids and
    routed_experts, and prompt_routed_experts where there are; of SGLang input_ids, output_ids and meta_info with
    routed_experts."""
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    """The run directory to write: a folder, or s3:// gs:// az://…"""
    from_: Annotated[DumpKind, tyro.conf.arg(name="from")]
    """What wrote the dump.
    sglang: files of its expert distribution recorder in the mode per_token (.pt), or responses with routed_experts as
    JSON lines; vllm: outputs with routed_experts as JSON lines; flame: the folder of a checkpoint of FLAME-MoE-Traces,
    MODEL/actives/iter_0540."""
    config: tyro.conf.OmitArgPrefixes[ImportConfig]

    def run(self) -> int:
        """Imports the dump and prints the run's status.

        Raises:
            ValueError: the dump or a setting is unusable, or no document could be made of it.
        """
        from collector.fleet.rejected import complaint
        from collector.look import terminal
        from collector.replica.importing import import_dump
        from collector.store.totals import Totals
        from collector.upkeep.verify import Ticker

        run, said = import_dump(self.dump, self.out, self.from_, self.config, Ticker("imported"))
        totals, plan = Totals.of(run), terminal.read_plan(run)
        with contextlib.suppress(BrokenPipeError):  # nobody reads on, but the run is what it is
            terminal.status(run, totals)
        sys.stderr.writelines(f"{line}\n" for line in said)
        if complained := complaint(totals.skipped, plan.documents):
            raise ValueError(complained)
        return 0
