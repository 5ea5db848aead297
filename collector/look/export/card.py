"""Writes the card of an exported run: what was recorded, its model and documents, how to load it, and its privacy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from collector.capture.recorders import RECORDERS
from collector.look import summary

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from collector.query.warehouse import Run
    from collector.store.run_directory import RunDirectory

NAME = "README.md"
MOST_LABELS = 200
"""Maximum number of labels in the list, those with the most tokens."""
_ROWS = {  # of the tables that no recorder writes
    "tokens": "a token that the model saw: document, position, id (see `vocab`), whether the tokenizer added it",
    "documents": "a document: id, label, source, tokens, characters, whether it was cut",
    "rejects": "a row of the source that became no document: its number, and why",
    "vocab": "a token id as readable text",
    "layers": "a router: experts to choose from, experts chosen per token",
    "components": "a part of the model's layers: parameters, and operations per token",
    "arms": "an edit of the routing, in an arm (control 0) or one of its controls",
    "maps": "a sampled pick: what its expert put out as a point of a plane, by layer and method",
    "weights": "two experts of a layer: how alike their weights are, by measure",
}
_PRIVACY = """\
Treat this data as you treat the text that it was made of. Even without text and token ids, the chosen experts alone
gave back 91 % of a text's tokens ([arXiv 2602.04105](https://arxiv.org/abs/2602.04105)). Publish it only if you may
publish the text, and under terms that suit the text's licence."""


def write(directory: RunDirectory, run: Run, rows: Mapping[str, int], front_matter: str) -> str:
    """Renders the card in Markdown.

    Args:
        directory: the run.
        run: the same run, opened.
        rows: rows by table.
        front_matter: text before the card, for the hub; the card then also explains how to load the dataset.
    """
    rows_of = {table: row for recorder in RECORDERS.values() for table, row in recorder.tables.items()} | _ROWS
    sections = [
        f"# Routing decisions of {run.info['model']['id']}",
        summary.summarize(directory)[0].rstrip(),
        "## Tables",
        _table(("table", "rows", "a row is"), [(f"`{name}`", f"{n:,}", rows_of[name]) for name, n in rows.items()]),
        "Tokens and decisions belong together by `shard` and `tok`, tokens and documents by `shard` and `doc`.",
        "## Labels",
        _labels(run),
        *(["## Loading", _LOADING] if front_matter else []),
        "## Privacy",
        _privacy(run),
    ]
    return front_matter + "\n\n".join(sections) + "\n"


_LOADING = """\
```python
from datasets import load_dataset

routing = load_dataset("USER/NAME", "routing", split="train", streaming=True)
```

`USER/NAME` is the data set on the hub, or the folder with this file. The folder is a run of moe-routing-collector as
well: `collector query FOLDER top_experts` asks it, `collector verify FOLDER` checks a copy."""


def _labels(run: Run) -> str:
    found = run.sql("select label, documents, tokens from labels order by tokens desc, label").fetchall()
    listed = [(_cell(label), f"{documents:,}", f"{tokens:,}") for label, documents, tokens in found[:MOST_LABELS]]
    table = _table(("label", "documents", "tokens"), listed)
    more = len(found) - MOST_LABELS
    return table if more <= 0 else f"{table}\n\nand {more:,} labels with fewer tokens."


def _privacy(run: Run) -> str:
    stored = run.info["config"].get("store") or ()
    return "The texts themselves are in `documents`.\n\n" + _PRIVACY if "text" in stored else _PRIVACY


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def _cell(text: str) -> str:
    """Escapes a label so that it stays within one cell of a table."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
