"""Renders the page docs/metrics.md, which documents all queries with their SQL headers and rows of real runs.

The page depends only on `queries/` and the two given runs, so it always matches the queries. This module writes no
files.
"""

from __future__ import annotations

import itertools
import shlex
from typing import TYPE_CHECKING

from collector.look.terminal import cell, markdown_table
from collector.query.catalog import GROUPS
from collector.query.comparison import list_comparisons, list_queries, open_runs

if TYPE_CHECKING:
    from collections.abc import Sequence

    import duckdb

    from collector.query.catalog import Param, Query
    from collector.query.comparison import Comparison

_ROWS = 5
"""Rows of an example."""
_DIGITS = 3
"""Significant digits in examples: few enough that machines which round differently agree."""

_INTRODUCTION = """\
# Metrics

What `collector query` can ask: of each query its formula, with denominators and baseline, where it comes from, what a
row is, and the first rows of an example. This page is written from the headers of `queries/*/*.sql` by

```sh
collector collect --per-label 12 --store text logits --record outputs loss similarity vocabulary effects \\
    --sample-tokens 100 --out runs/small --arms \\
    'no 31: layer=4 expert=31 operation=drop' 'no 31 #1: layer=4 expert=9 operation=drop' \\
    'kor_Hang: layer=4 expert=55 operation=drop' 'eng_Latn: layer=4 expert=44 operation=drop'
collector collect --per-label 12 --store text logits --out runs/small-random --weights random
collector weights runs/small --no-match
collector map runs/small --layer 4 --method pca
collector query runs/small --list --format markdown --beside runs/small-random > docs/metrics.md
```

The runs of the examples are the demo model over 12 sentences of each of 60 languages, and the same model untrained.

Everything is per router unless it says otherwise; padding never counts. E is the number of a router's experts, k how
many of them a token gets, D a label, as a rule a language. A baseline is the value where there is nothing to find.
"""
_COMMON = """\
## Parameters of most queries

`--param value` on the command line, keyword arguments in Python; lists are separated by commas, `all` is no limit.
"""
_COMPARISONS = """\
# Metrics of two runs

Of two runs of the same tokens: `collector query RUN NAME --beside OTHER`, in Python
`open_runs(run, other).query(name)`. Vocabulary, documents, labels, tokens and routers must agree, whatever the shards;
what differs is named, and nothing is compared. Every query above also takes `--beside`: it then gives each row with the
other run's columns as `…_beside`, and `difference`, the other's value less this one's.
"""


def page(runs: tuple[str, str] | None) -> str:
    """Renders the page in Markdown.

    Args:
        runs: a run of the demo and one of the untrained model, for the examples (None: examples without rows).
    """
    pair = None if runs is None else open_runs(*runs)
    single, double = list_queries(), list_comparisons()
    shared = _shared_params(single)
    return "\n".join([
        _INTRODUCTION, _contents((*single, *double)), _COMMON, _params_table(shared),
        *(_section(query, shared, pair) for query in single),
        _COMPARISONS,
        *(_section(query, shared, pair) for query in double),
    ]).rstrip() + "\n"  # fmt: skip


def _contents(queries: Sequence[Query]) -> str:
    """Links to all queries, by group."""
    parts = []
    for group, members in itertools.groupby(queries, key=lambda query: query.group):
        parts.append(f"**{group.capitalize()}**: {GROUPS[group]}\n")
        parts.append("".join(f"- [`{query.name}`](#{query.name}): {query.question}\n" for query in members))
    return "\n".join(parts)


def _shared_params(queries: Sequence[Query]) -> list[Param]:
    """Returns the parameters that most queries have."""
    params = [param for query in queries for param in query.params]
    return [param for param in dict.fromkeys(params) if params.count(param) > len(queries) / 2]


def _section(query: Query, shared: Sequence[Param], pair: Comparison | None) -> str:
    own = [param for param in query.params if param not in shared]
    missing = [f"`{param.name}`" for param in shared if param not in query.params]
    reads = ", ".join(f"`{name}`" for name in query.reads)
    biased = ", ".join(f"`{metric}`" for metric in query.biased)
    parts = [
        f"## {query.name}\n\n{query.question}\n",
        f"```text\n{query.formula}\n```\n",
        f"- Source: {_joined(query.source)}\n- One row per {_joined(query.grain)}\n- Reads {reads}\n"
        + (f"- [Corrected](uncertainty.md#few-documents) for the number of documents: {biased}\n" if biased else ""),
        _params_table(own) if own else "",
        f"Without the parameters {', '.join(missing)}.\n" if missing else "",
        _example(query, pair),
    ]
    return "\n".join(part for part in parts if part)


def _joined(text: str) -> str:
    return " ".join(text.split())


def _params_table(params: Sequence[Param]) -> str:
    rows = [
        (f"`{param.name}`", param.type, "" if param.default is None else str(param.default).lower(), param.help)
        for param in params
    ]
    return markdown_table(("parameter", "type", "default", "meaning"), rows)


def _example(query: Query, pair: Comparison | None) -> str:
    beside = " --beside runs/small-random" if query.of_two_runs else ""
    command = f"```sh\ncollector query runs/small {query.name}{beside} {query.example}\n```\n"
    if pair is None:
        return command
    if missing := [name for name in query.reads if not query.of_two_runs and not pair.run.has(name)]:
        return f"{command.replace('runs/small', 'RUN')}\nThe runs of the examples have no `{missing[0]}`.\n"
    words = shlex.split(query.example)
    params = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    result = (pair if query.of_two_runs else pair.run).query(query.name, **params)
    return f"{command}\n{_rows(result)}"


def _rows(result: duckdb.DuckDBPyRelation) -> str:
    rows = result.limit(_ROWS + 1).fetchall()
    if not rows:
        return "No rows: these runs have nothing of it.\n"
    cells = [[_text(value) for value in row] for row in rows[:_ROWS]]
    rest = [["…"] + [""] * (len(result.columns) - 1)] if len(rows) > _ROWS else []
    return markdown_table(result.columns, cells + rest)


def _text(value: object) -> str:
    return cell(value, digits=_DIGITS).replace("|", "\\|").replace("\n", " ")
