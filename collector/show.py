"""What people read in a terminal: a run's card, its totals, and query results.

Everything shown comes from the run directory or from the queries; nothing is computed here but
sums of commit records.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from collector.plan import Plan
from collector.storage import PLAN, RUN, SUCCESS, RunDirectory

if TYPE_CHECKING:
    from collections.abc import Sequence

    import duckdb

    from collector.warehouse import Query, Run

MAX_ROWS = 40
_WIDE = 200


def console() -> Console:
    """Standard output; not cut to 80 columns where there is no terminal."""
    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(highlight=False, width=_WIDE)


@dataclasses.dataclass(kw_only=True)
class Totals:
    """Sums over the commit records of a run."""

    shards: int = 0
    documents: int = 0
    tokens: int = 0
    rows: int = 0
    characters: int = 0
    truncated: int = 0
    padded_tokens: int = 0
    bytes: int = 0
    seconds: Counter[str] = dataclasses.field(default_factory=Counter)
    skipped: Counter[str] = dataclasses.field(default_factory=Counter)
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, run: RunDirectory) -> Totals:
        """Reads all commit records."""
        totals = cls()
        for commit in run.commits():
            totals.shards += 1
            for name in ("documents", "tokens", "rows", "characters", "truncated", "padded_tokens"):
                setattr(totals, name, getattr(totals, name) + getattr(commit, name))
            totals.bytes += sum(part.bytes for part in commit.files.values())
            totals.seconds.update(commit.seconds)
            for reason, skipped in commit.skipped.items():
                totals.skipped[reason] += skipped.count
                totals.examples.setdefault(reason, []).extend(skipped.examples)
        return totals


def status(run: RunDirectory) -> bool:
    """Prints how far a run is, what was left out and why; True if the run is complete.

    Raises:
        FileNotFoundError: there is no run.
    """
    stored = run.read_or_none(PLAN)
    if stored is None:
        raise FileNotFoundError(
            f"no run in {run.root}: there is no {PLAN}; collector collect --out {run.root} begins one"
        )
    plan, totals, failures = Plan.from_parquet(stored), Totals.of(run), run.failures()
    complete = run.read_or_none(SUCCESS) is not None
    out = console()
    state = "complete" if complete else f"incomplete, {len(plan.shards) - totals.shards} shards to go"
    out.print(f"[bold]{run.root}[/]: {state}")
    grid = Table.grid(padding=(0, 2))
    for name, value in _facts(run, plan, totals):
        grid.add_row(name, value)
    out.print(grid)
    for shard, failure in sorted(failures.items()):
        out.print(f"[red]shard {shard} failed[/] after {failure['attempts']} attempts "
                  f"({failure['source']}, rows from {failure['first_row']}):")  # fmt: skip
        out.print(failure["traceback"].rstrip(), markup=False)
    if not complete:
        out.print("Run the same collect command again to resume.")
    return complete


def _facts(run: RunDirectory, plan: Plan, totals: Totals) -> list[tuple[str, str]]:
    facts = []
    stored = run.read_or_none(RUN)
    if stored is not None:
        card = json.loads(stored)
        model, layers = card["model"], card["layers"]
        geometry = sorted({(layer["n_experts"], layer["top_k"]) for layer in layers})
        experts = ", ".join(f"top-{k} of {e}" for e, k in geometry)
        facts.append(("model", f"{model['id']} ({model['model_type']}, {model['weights']} weights, {model['dtype']}, "
                               f"{model['parameters']:,} parameters)"))  # fmt: skip
        facts.append(("routers", f"{len(layers)} layers, {experts}"))
    efficiency = totals.tokens / max(1, totals.padded_tokens)
    facts += [
        ("shards", f"{totals.shards:,} of {len(plan.shards):,}"),
        ("documents", f"{totals.documents:,} of {plan.documents:,} planned, {totals.truncated:,} truncated"),
        ("tokens", f"{totals.tokens:,} ({totals.rows:,} routing rows), padding efficiency {efficiency:.3f}"),
        ("size", f"{totals.bytes / 1e6:,.1f} MB, {totals.bytes / max(1, totals.tokens):.0f} bytes/token"),
    ]
    for reason, count in sorted(totals.skipped.items()):
        facts.append(("skipped", f"{count:,} rows: {reason} (e.g. {', '.join(totals.examples[reason][:3])})"))
    return facts


def top_experts_by_layer(run: Run, labels: Sequence[str] | None, beside: Run | None = None) -> None:
    """Prints, per label and layer, the most specialised expert and its domain specialization.

    Args:
        run: the run to show.
        labels: which labels (None: all).
        beside: another run, shown behind the first in each cell (as a rule the untrained baseline).
    """
    tops = [_most_specialised(each, labels) for each in (run, *([beside] if beside else []))]
    layers = [layer["layer"] for layer in run.info["layers"]]
    baselines = {layer["top_k"] / layer["n_experts"] for layer in run.info["layers"]}
    title = "Top expert and its domain specialization (share of a language's tokens that choose it)"
    caption = f"baseline k/E = {', '.join(f'{b:.3f}' for b in sorted(baselines))}"
    if beside:
        caption += f"; behind the bar: {beside.info['model']['weights']} weights"
    table = Table("label", *(f"layer {layer}" for layer in layers), title=title, caption=caption, box=None)
    for label in sorted({label for _, label in tops[0]}):
        table.add_row(label, *(" | ".join(_cell(top.get((layer, label))) for top in tops) for layer in layers))
    console().print(table)


def _most_specialised(run: Run, labels: Sequence[str] | None) -> dict[tuple[int, str], tuple[int, float]]:
    relation = run.query("domain_specialization", labels=labels)
    best = relation.aggregate("layer, label, arg_max(expert, value), max(value)", "layer, label")
    return {(layer, label): (expert, value) for layer, label, expert, value in best.fetchall()}


def _cell(top: tuple[int, float] | None) -> str:
    return "–" if top is None else f"{top[0]:>2} {top[1]:.2f}"


def queries(available: Sequence[Query]) -> None:
    """Prints question, parameters and grain of every query."""
    out = console()
    for query in available:
        out.print(f"[bold]{query.name}[/]  {query.question}", soft_wrap=True)
        out.print(f"  one row per {query.grain}", markup=False, soft_wrap=True)
        for param in query.params:
            default = "" if param.default is None else f" = {str(param.default).lower()}"
            out.print(f"  --{param.name} {param.type}{default}: {param.help}", markup=False, soft_wrap=True)


def relation(result: duckdb.DuckDBPyRelation, style: str) -> None:
    """Writes a result to standard output as `table`, `csv`, `json` or `parquet`."""
    if style == "table":
        _print_table(result)
    elif style == "json":
        rows = [dict(zip(result.columns, row, strict=True)) for row in result.fetchall()]
        sys.stdout.write(json.dumps(rows, default=str, ensure_ascii=False) + "\n")
    else:
        import pyarrow.csv
        import pyarrow.parquet

        write: Any = pyarrow.csv.write_csv if style == "csv" else pyarrow.parquet.write_table
        write(result.to_arrow_table(), sys.stdout.buffer)


def _print_table(result: duckdb.DuckDBPyRelation) -> None:
    rows = result.limit(MAX_ROWS + 1).fetchall()
    table = Table(*result.columns, box=None)
    for row in rows[:MAX_ROWS]:
        table.add_row(*(_text(value) for value in row))
    console().print(table)
    if len(rows) > MAX_ROWS:
        sys.stderr.write(f"only the first {MAX_ROWS} rows are shown; --format csv, json or parquet gives all\n")


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
