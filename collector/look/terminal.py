"""Prints for the terminal: a run's status and totals, query results, and lists of queries and models.

Everything shown comes from the run directory or from the queries; the only computation here is
summing commit records.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.table import Table

from collector.data.plan import Plan
from collector.fleet.progress import PlainConsole, shares
from collector.fleet.rejected import told
from collector.query.catalog import GROUPS
from collector.store import throughput
from collector.store.run_directory import PLAN, RUN, SUCCESS
from collector.store.sweep_directory import hint as sweep_hint
from collector.store.totals import Totals

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import duckdb
    import pyarrow as pa
    from rich.console import Console

    from collector.models.families import Description
    from collector.query.warehouse import Query, Run
    from collector.store.run_directory import RunDirectory

MAX_ROWS = 40
_WIDE = 200


def console() -> Console:
    """Returns a console for standard output, not cut to 80 columns if that is not a terminal."""
    plain = PlainConsole()
    return plain if plain.is_terminal else PlainConsole(width=_WIDE)


def status(run: RunDirectory, totals: Totals | None = None) -> bool:
    """Prints a run's progress, what was left out and why; returns whether the run is complete.

    Args:
        run: the run.
        totals: of its commit records, if they have been read already.

    Raises:
        FileNotFoundError: there is no run.
    """
    plan = read_plan(run)
    totals = totals or Totals.of(run)
    complete = run.read_or_none(SUCCESS) is not None
    out = console()
    state = "complete" if complete else f"incomplete, {len(plan.shards) - len(totals.committed)} shards to go"
    out.print(f"[bold]{run.root}[/]: {state}")
    grid = Table.grid(padding=(0, 2))
    for name, value in _facts(run, plan, totals):
        grid.add_row(name, value)
    out.print(grid)
    failures = totals.failures(run)
    for shard, failure in failures.items():
        ending = "left out" if failure.get("left_out") else "to be tried again"
        out.print(f"[red]shard {shard} failed[/] after {failure['attempts']} attempts, {ending} "
                  f"({failure['source']}, rows from {failure['first_row']}):")  # fmt: skip
        out.print(failure["traceback"].rstrip(), markup=False)
    if not complete:
        left_out = any(failure.get("left_out") for failure in failures.values())
        again = "; with --retry-failed it tries again what was left out" if left_out else ""
        out.print(f"Run the same collect command again to resume{again}.")
    return complete


def watch(run: RunDirectory, every: float) -> bool:
    """Prints the status repeatedly, until the run is complete or only failed shards are left.

    Args:
        run: the run.
        every: seconds between two updates; each reads only the new commit records.

    Raises:
        FileNotFoundError: there is no run.
    """
    plan, totals, out, rate = read_plan(run), Totals.of(run), console(), ""
    while True:
        if out.is_terminal:
            out.clear()
        complete = status(run, totals)
        out.print(rate, end="")
        left_out = sum(bool(failure.get("left_out")) for failure in totals.failures(run).values())
        if complete or (left_out and len(totals.committed) + left_out == len(plan.shards)):
            return complete
        tokens, since = totals.tokens, time.monotonic()
        time.sleep(every)
        totals.refresh(run)
        rate = f"{(totals.tokens - tokens) / (time.monotonic() - since):,.0f} tokens/s since the last look\n"


def read_plan(run: RunDirectory) -> Plan:
    """Reads the plan of a run.

    Raises:
        FileNotFoundError: there is no run.
    """
    stored = run.read_or_none(PLAN)
    if stored is None:
        told = sweep_hint(run.root) or f"there is no {PLAN}; collector collect --out {run.root} begins one"
        raise FileNotFoundError(f"no run in {run.root}: {told}")
    return Plan.from_parquet(stored)


def _facts(run: RunDirectory, plan: Plan, totals: Totals) -> list[tuple[str, str]]:
    facts = []
    stored = run.read_or_none(RUN)
    if stored is not None:
        card = json.loads(stored)
        facts.append(("model", model(card)))
        facts.append(("routers", routers(card["layers"])))
    facts += [
        ("shards", f"{len(totals.committed):,} of {len(plan.shards):,}"),
        ("documents", f"{totals.documents:,} of {plan.documents:,} planned, {totals.truncated:,} truncated"),
    ]
    size = f"{totals.bytes / 1e6:,.1f} MB"
    if totals.tokens:
        padding = f", padding efficiency {totals.padding_efficiency:.3f}" if totals.padded_tokens else ""
        facts.append(("tokens", f"{totals.tokens:,} ({totals.rows:,} recorded rows){padding}"))
        size += f", {totals.bytes / totals.tokens:.0f} bytes/token"
    facts.append(("size", size))
    if time_shares := shares(totals.seconds):
        facts.append(("time", time_shares))
    if stored is not None and (operations := throughput.described(card, totals)):
        facts.append(("compute", operations))
    if totals.halved:
        facts.append(("memory", f"{totals.halved:,} batches did not fit and were halved; a lower --tokens-per-batch "
                                "would save the attempts"))  # fmt: skip
    for reason, count in sorted(totals.skipped.items()):
        facts.append(("skipped", f"{told(reason, count)}, e.g. {', '.join(totals.examples[reason][:3])}"))
    return facts


def model(card: Mapping[str, Any]) -> str:
    """Describes the model of a run and how its weights were stored."""
    told = card["model"]
    if imported := card.get("imported"):
        return f"{told['id']} (imported from {imported['from']}, without {', '.join(imported['lacks'])})"
    return f"{told['id']} ({told['model_type']}, {told['weights']} weights, {card['memory']['summary']})"


def origin(card: Mapping[str, Any]) -> str:
    """Describes in two words where a run's routing is from."""
    imported = card.get("imported")
    return f"imported from {imported['from']}" if imported else f"{card['model']['weights']} weights"


def routers(layers: Sequence[Mapping[str, Any]]) -> str:
    """Describes how many routers were recorded, and from how many experts they choose."""
    geometry = sorted({(layer["n_experts"], layer["top_k"]) for layer in layers})
    experts = ", ".join(f"top-{k} of {e}" for e, k in geometry)
    by_stack = Counter(layer["stack"] for layer in layers)
    several = by_stack.keys() != {"decoder"}
    counts = [f"{n} {f'{stack} ' if several else ''}layer{'s' if n > 1 else ''}" for stack, n in by_stack.items()]
    return f"{', '.join(counts)}, {experts}"


def top_experts_by_layer(run: Run, labels: Sequence[str] | None, beside: Run | None = None) -> None:
    """Prints, per label and layer, the most specialised expert and its domain specialization.

    Args:
        run: the run to show.
        labels: labels to show (None: all).
        beside: another run, shown after the first in each cell (usually the untrained baseline).
    """
    tops = [_most_specialised(each, labels) for each in (run, *([beside] if beside else []))]
    routers = [(layer["stack"], layer["layer"]) for layer in run.info["layers"]]
    baselines = {layer["top_k"] / layer["n_experts"] for layer in run.info["layers"]}
    title = "Top expert and its domain specialization (share of a language's tokens that choose it)"
    caption = f"baseline k/E = {', '.join(f'{b:.3f}' for b in sorted(baselines))}"
    if beside:
        caption += f"; behind the bar: {origin(beside.info)}"
    several = len({stack for stack, _ in routers}) > 1
    heads = [f"{stack} layer {layer}" if several else f"layer {layer}" for stack, layer in routers]
    table = Table("label", *heads, title=title, caption=caption, box=None)
    for label in sorted({label for *_, label in tops[0]}):
        cells = [[_cell(top.get((*router, label))) for top in tops] for router in routers]
        table.add_row(label, *map(" | ".join, cells))
    console().print(table)


def _most_specialised(run: Run, labels: Sequence[str] | None) -> dict[tuple[str, int, str], tuple[int, float]]:
    """Returns the expert with the highest domain specialization, and its value, by (stack, layer, label)."""
    relation = run.query("domain_specialization", labels=labels)
    best = relation.aggregate("stack, layer, label, arg_max(expert, value), max(value)", "stack, layer, label")
    return {tuple(key): (expert, value) for *key, expert, value in best.fetchall()}


def _cell(top: tuple[int, float] | None) -> str:
    return "–" if top is None else f"{top[0]:>2} {top[1]:.2f}"


def queries(available: Sequence[Query]) -> None:
    """Prints question, parameters and grain of every query, by group."""
    out = console()
    group = None
    for query in available:
        if query.group != group:
            group = query.group
            out.print(f"[bold underline]{group}[/]  {GROUPS[group]}", soft_wrap=True)
        out.print(f"[bold]{query.name}[/]  {query.question}", soft_wrap=True)
        if query.of_two_runs:
            out.print(f"  of two runs: collector query RUN {query.name} --beside OTHER", soft_wrap=True)
        out.print(f"  one row per {query.grain}", markup=False, soft_wrap=True)
        for param in query.params:
            default = "" if param.default is None else f" = {str(param.default).lower()}"
            out.print(f"  --{param.name} {param.type}{default}: {param.help}", markup=False, soft_wrap=True)


_MODELS_INTRODUCTION = """\
# Model families

`collector models --format markdown` writes this page. It lists the model families of transformers {version} whose
modeling module declares routers: {captured} of {all} are captured. Each family's text-only base model was built with
tiny random weights; `tests/models/test_families.py` checks the capture of each against what its experts received.

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
    introduction = _MODELS_INTRODUCTION.format(version=__version__, captured=captured, all=len(rows))
    sys.stdout.write(f"{introduction}\n{markdown_table(header, rows)}")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a table in Markdown."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, ["---"] * len(header), *rows))


def _count(number: int | None) -> str:
    return "–" if number is None else str(number)


def relation(result: duckdb.DuckDBPyRelation, style: str) -> None:
    """Writes a result to standard output as `table`, `markdown`, `csv`, `json` or `parquet`."""
    if style == "table":
        _print_table(result)
    elif style == "markdown":
        sys.stdout.write(markdown_table(result.columns, [[cell(value) for value in row] for row in result.fetchall()]))
    elif style == "json":
        rows = [dict(zip(result.columns, row, strict=True)) for row in result.fetchall()]
        sys.stdout.write(json.dumps(rows, default=str, ensure_ascii=False) + "\n")
    else:
        import pyarrow.csv
        import pyarrow.parquet

        table = result.to_arrow_table()
        if style == "csv":
            pyarrow.csv.write_csv(_with_lists_as_json(table), sys.stdout.buffer)
        else:
            pyarrow.parquet.write_table(table, sys.stdout.buffer)


def _with_lists_as_json(table: pa.Table) -> pa.Table:
    """Returns the table with lists as text: a cell of CSV holds no list."""
    import pyarrow as pa

    for place, field in enumerate(table.schema):
        if pa.types.is_nested(field.type):
            texts = [
                None if value is None else json.dumps(value, ensure_ascii=False)
                for value in table.column(place).to_pylist()
            ]
            table = table.set_column(place, field.name, pa.array(texts, pa.string()))
    return table


def uncertain(table: pa.Table, style: str) -> None:
    """Writes intervals or tests like `relation`, and warns on standard error of rows from few documents."""
    import duckdb
    import pyarrow.compute as pc

    from collector.query.warehouse import FEW_DOCUMENTS

    relation(duckdb.from_arrow(table), style)
    counted = "available" if "available" in table.column_names else "documents"  # of a curve: the sample size
    few = pc.sum(pc.less(table[counted], FEW_DOCUMENTS)).as_py() or 0
    if few:
        sys.stderr.write(f"{few:,} of {table.num_rows:,} rows rest on fewer than {FEW_DOCUMENTS} documents of a label "
                         f"(column {counted}): read them with care\n")  # fmt: skip


def _print_table(result: duckdb.DuckDBPyRelation) -> None:
    rows = result.limit(MAX_ROWS + 1).fetchall()
    table = Table(*result.columns, box=None)
    for row in rows[:MAX_ROWS]:
        table.add_row(*(cell(value) for value in row))
    console().print(table)
    if len(rows) > MAX_ROWS:
        sys.stderr.write(f"only the first {MAX_ROWS} rows are shown; --format csv, json or parquet gives all\n")


def cell(value: Any, digits: int = 4) -> str:
    """Formats a value for a table, floats with this many significant digits, those of lists too."""
    if isinstance(value, list):
        return f"[{', '.join(cell(each, digits) for each in value)}]"
    return "" if value is None else f"{value:.{digits}g}" if isinstance(value, float) else str(value)
