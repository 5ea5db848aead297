"""Exports a run as a dataset for the Hugging Face hub: a folder whose card has a configuration per table.

The folder is still a run, without orphans, failures and records set aside, so `collector query`, `sql` and `verify`
work on it and on every copy. Parts are hard links if the run is on the same file system, copies otherwise. Machine
names are replaced by node-1, node-2 …; names of source files remain, in `documents.source`, the plan and run.json.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collector.capture.recorders import table_names
from collector.look import terminal
from collector.query.warehouse import views_sql
from collector.store.run_directory import MAPS, PLAN, REJECTS, RUN, VIEWS, VOCAB, RunDirectory, weights_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from collector.query.warehouse import Run


def write(source: RunDirectory, run: Run, folder: Path) -> dict[str, int]:
    """Links or copies the committed files of a run into a folder.

    Returns:
        Rows by table, according to the commit records.
    """
    target, rows, nodes = RunDirectory(folder), Counter[str](), dict[str, str]()
    for commit in source.commits():
        for table, part in commit.files.items():
            _place(source, part.path, folder)
            rows[table] += part.rows
        node = nodes.setdefault(commit.node, f"node-{len(nodes) + 1}")
        target.commit(dataclasses.replace(commit, node=node))
    made_once = [table for table in ("weights", "maps") if run.has(table)]
    for name in (PLAN, RUN, VOCAB, *(file for table in made_once for file in source.store.list(table))):
        content = source.read_or_none(name)
        if content is not None:
            target.store.put(name, content)
    target.store.put(VIEWS, views_sql(target).encode())
    if run.complete:
        plan = terminal.read_plan(source)
        target.finish(plan.hash, len(plan.shards))
    rows["vocab"] = run.sql("select count(*) from vocab").fetchall()[0][0]
    for table in made_once:
        rows[table] = run.sql(f"select count(*) from {table}").fetchall()[0][0]
    return {table: count for table, count in rows.items() if count}


def _place(source: RunDirectory, name: str, folder: Path) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        # the run's own file if it is local, else a download into the scratch folder
        copy = source.store.local_copy(name, Path(scratch))
        try:
            os.link(copy, path)
        except OSError:  # another file system, or a file of another user
            shutil.copyfile(copy, path)


def front_matter(run: Run, rows: Mapping[str, int]) -> str:
    """Returns the metadata that the hub and `datasets.load_dataset` read at the top of a card, in YAML."""
    from huggingface_hub import DatasetCardData

    files = {table: f"data/*.{table}.parquet" for table in table_names(run.info)}
    files |= {REJECTS: f"{REJECTS}/*.{REJECTS}.parquet", "vocab": VOCAB}
    files |= {"weights": weights_name(run.info), "maps": f"{MAPS}/*.parquet"}
    tables = [table for table in files if rows.get(table)]  # the first one is the default
    configs: list[dict[str, Any]] = [{"config_name": table, "data_files": files[table]} for table in tables]
    if configs:
        configs[0]["default"] = True
    data = DatasetCardData(
        pretty_name=f"Routing of {run.info['model']['id']}",
        tags=["mixture-of-experts", "routing", "interpretability", "moe-routing-collector"],
        size_categories=_size_category(max(rows.values(), default=0)),
        configs=configs,
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def _size_category(rows: int) -> str:
    """Returns the hub's size category for a number of rows."""
    names = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    decade = next((i for i in range(len(names)) if rows < 10 ** (3 + i)), len(names))
    if decade == 0:
        return f"n<{names[0]}"
    return f"n>{names[-1]}" if decade == len(names) else f"{names[decade - 1]}<n<{names[decade]}"
