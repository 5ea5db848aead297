"""Collects in this process, and reads back everything that a run committed."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from collector.config import CaptureConfig, DataConfig, ModelConfig, RunConfig, resolve
from collector.fleet import driver
from collector.store.run_directory import Commit, RunDirectory, Skipped

KEYS = {
    "routing": ["shard", "layer", "tok"], "tokens": ["shard", "tok"], "documents": ["shard", "doc"],
    "outputs": ["shard", "stack", "layer", "doc", "is_special"],
    "similarity": ["shard", "stack", "layer", "block", "over"],
    "projections": ["shard", "stack", "layer", "tok", "expert"],
    "promotions": ["shard", "stack", "layer", "tok", "expert"],
    "effects": ["shard", "doc", "arm", "control"],
    "token_effects": ["shard", "tok", "arm"],
}  # fmt: skip
"""Of the tables that every shard has, if their recorder ran."""


def run_config(data: DataConfig, model: ModelConfig, **capture: object) -> RunConfig:
    return resolve(data=data, model=model, capture=CaptureConfig(**capture), device="cpu")


def collect_here(root: Path, config: RunConfig, *, loaded=None, threads: int | None = None) -> RunDirectory:
    return driver.collect_in_process(str(root), config, loaded=loaded, threads=threads)


def content(run: RunDirectory) -> dict[str, pa.Table]:
    """Every committed row of every table, in key order; fails on a key that is there twice."""
    tables = {}
    commits = list(run.commits())
    for name in KEYS:
        if commits and name not in commits[0].files:
            continue
        parts = [pq.read_table(Path(run.store.location(commit.files[name].path))) for commit in commits]
        table = pa.concat_tables(parts)
        for key in KEYS[name]:
            if pa.types.is_dictionary(table[key].type):
                table = table.set_column(table.schema.get_field_index(key), key, table[key].cast(pa.string()))
        table = table.sort_by([(key, "ascending") for key in KEYS[name]])
        assert table.group_by(KEYS[name]).aggregate([]).num_rows == table.num_rows, f"{name}: a key twice"
        tables[name] = table
    return tables


def assert_same_content(one: RunDirectory, other: RunDirectory) -> None:
    a, b = content(one), content(other)
    assert a.keys() == b.keys()
    for name in a:
        # Dictionaries may be cut differently; values may not.
        assert a[name].to_pydict() == b[name].to_pydict(), f"{name} differs"


def write_jsonl(path: Path, count: int, labels: tuple[str, ...] = ("en", "ko")) -> Path:
    """A file of real sentences, labels in turns."""
    from collector.data.corpus import read_sentences

    by_iso = {iso: [s.text for s in read_sentences("heldout") if s.iso == iso] for iso in labels}
    rows = [{"text": by_iso[labels[i % len(labels)]][(i // len(labels)) % 100], "label": labels[i % len(labels)]}
            for i in range(count)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def attempt(run: RunDirectory, shard: int, name: str, content: bytes = b"rows") -> Commit:
    """Publishes one part and returns the record that would commit it."""
    with run.scratch() as scratch:
        path = Path(scratch) / "routing"
        path.write_bytes(content)
        part = run.publish_part(path, shard, name, "routing", rows=1)
    return Commit(shard=shard, attempt=name, plan_hash="p", files={"routing": part}, documents=1, tokens=1, rows=1,
                  characters=3, truncated=0, skipped={"no text": Skipped(count=1, examples=("a#1",))}, batches=1,
                  padded_tokens=1, seconds={"forward": 0.5}, node="here")  # fmt: skip
