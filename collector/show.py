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

    from collector.families import Description
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
    halved: int = 0
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
            for name in ("documents", "tokens", "rows", "characters", "truncated", "padded_tokens", "halved"):
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
        by_stack = Counter(layer["stack"] for layer in layers)
        counts = [f"{n} layers" if by_stack.keys() == {"decoder"} else f"{n} {s} layers" for s, n in by_stack.items()]
        facts.append(("model", f"{model['id']} ({model['model_type']}, {model['weights']} weights, "
                               f"{card['memory']['summary']})"))  # fmt: skip
        facts.append(("routers", f"{', '.join(counts)}, {experts}"))
    efficiency = totals.tokens / max(1, totals.padded_tokens)
    facts += [
        ("shards", f"{totals.shards:,} of {len(plan.shards):,}"),
        ("documents", f"{totals.documents:,} of {plan.documents:,} planned, {totals.truncated:,} truncated"),
        ("tokens", f"{totals.tokens:,} ({totals.rows:,} routing rows), padding efficiency {efficiency:.3f}"),
        ("size", f"{totals.bytes / 1e6:,.1f} MB, {totals.bytes / max(1, totals.tokens):.0f} bytes/token"),
    ]
    if totals.halved:
        facts.append(("memory", f"{totals.halved:,} batches did not fit and were halved; a lower --tokens-per-batch "
                                "would save the attempts"))  # fmt: skip
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
    routers = [(layer["stack"], layer["layer"]) for layer in run.info["layers"]]
    baselines = {layer["top_k"] / layer["n_experts"] for layer in run.info["layers"]}
    title = "Top expert and its domain specialization (share of a language's tokens that choose it)"
    caption = f"baseline k/E = {', '.join(f'{b:.3f}' for b in sorted(baselines))}"
    if beside:
        caption += f"; behind the bar: {beside.info['model']['weights']} weights"
    several = len({stack for stack, _ in routers}) > 1
    heads = [f"{stack} layer {layer}" if several else f"layer {layer}" for stack, layer in routers]
    table = Table("label", *heads, title=title, caption=caption, box=None)
    for label in sorted({label for *_, label in tops[0]}):
        cells = [[_cell(top.get((*router, label))) for top in tops] for router in routers]
        table.add_row(label, *map(" | ".join, cells))
    console().print(table)


def _most_specialised(run: Run, labels: Sequence[str] | None) -> dict[tuple[str, int, str], tuple[int, float]]:
    """(stack, layer, label) -> the expert with the highest domain specialization, and that."""
    relation = run.query("domain_specialization", labels=labels)
    best = relation.aggregate("stack, layer, label, arg_max(expert, value), max(value)", "stack, layer, label")
    return {tuple(key): (expert, value) for *key, expert, value in best.fetchall()}


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


_MODELS_INTRODUCTION = """\
# Model families

`collector models --format markdown` writes this page. It lists the model families of transformers {version} whose
modeling module declares routers: {captured} of {all} are captured. Each family's text-only base model was built with
tiny random weights; `tests/test_families.py` checks the capture of each against what its experts received.

E and k are those of the family's default config (– where it leaves them open, and a checkpoint's may differ). *Also
decides*: what chooses experts besides the router's logits; groups as kept of all. *Ids*: whether the router returns the
ids of the chosen experts, or how they are recomputed. *Experts*: how a layer's experts are stored; "fused 3-D" is one
tensor with an axis of experts. `--quantization nf4` converts all of them but those without a 4-bit form. `--weights
random` and text alone suffice for all; of a multimodal model the text path is collected.
"""


def models(descriptions: Sequence[Description], style: str) -> None:
    """Writes the model families to standard output as `table` or `markdown`."""
    header = ("family", "base model", "router", "E", "k", "also decides", "ids", "experts")
    rows = [
        (
            each.family, each.model, each.router, _count(each.n_experts), _count(each.top_k), each.rules,
            each.ids if not each.reason else f"not captured: {each.reason}", each.experts,
        )
        for each in descriptions
    ]  # fmt: skip
    if style == "table":
        table = Table(*header, box=None)
        for row in rows:
            table.add_row(*row)
        console().print(table)
        return
    from transformers import __version__

    captured = sum(not each.reason for each in descriptions)
    lines = ["| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *rows)]
    introduction = _MODELS_INTRODUCTION.format(version=__version__, captured=captured, all=len(rows))
    sys.stdout.write("\n".join([introduction, *lines, ""]))


def _count(number: int | None) -> str:
    return "–" if number is None else str(number)


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
