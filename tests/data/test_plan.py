"""The plan: deterministic, complete, hashed to the last row number, and refused when a source changed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collector.data import plan
from collector.data.plan import frozen, making
from collector.data.sources import BadRow, Document
from tests.helpers.documents import GOOD, config, write_pairs

if TYPE_CHECKING:
    from pathlib import Path

    from collector.config import RunConfig


def read(settings: RunConfig) -> list[Document | BadRow]:
    made = plan.make_plan(settings)
    return [row for shard in made.shards for row in plan.read_shard(shard, settings.data)]


# -- selection ---------------------------------------------------------------------------------------


def select(files: list[list[tuple[str, str] | None]], per_label: int | None, limit: int | None) -> list[str]:
    """What the two options mean, naively: ids of the rows taken, a bad one with its reason."""
    taken: list[str] = []
    labels: list[str] = []
    for number, rows in enumerate(files):
        for row, content in enumerate(rows):
            if limit is not None and len(labels) >= limit:
                return taken
            if content is None:
                taken.append(f"bad {number}.jsonl#{row}")
            elif per_label is None or labels.count(content[1]) < per_label:
                taken.append(f"{number}.jsonl#{row}")
                labels.append(content[1])
    return taken


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("selection")


rows = st.lists(st.sampled_from([None, ("one", "x"), ("two", "y"), ("three", "z")]), max_size=14)
some = st.one_of(st.none(), st.integers(1, 9))


@settings(deadline=None, max_examples=150)
@given(st.lists(rows, min_size=1, max_size=3), some, some, st.sampled_from([1, 2, 3, 5, 100]))
def test_selection_against_a_naive_reference(folder: Path, files, per_label, limit, every: int) -> None:
    paths = [write_pairs(folder / f"{number}.jsonl", content) for number, content in enumerate(files)]
    expected = select(files, per_label, limit)
    settings = config(*paths, per_label=per_label, limit=limit, docs_per_shard=every)
    if not expected:
        with pytest.raises(ValueError, match="no row at all"):
            plan.make_plan(settings)
        return
    made = plan.make_plan(settings)
    got = [list(plan.read_shard(shard, settings.data)) for shard in made.shards]
    flat = [f"bad {row.where}" if isinstance(row, BadRow) else row.id for shard in got for row in shard]
    assert flat == expected
    assert made.documents == len(expected)
    assert [len(shard) for shard in got] == [shard.planned for shard in made.shards]
    assert max(map(len, got)) <= every
    if per_label is None:
        assert all(shard.keep is None for shard in made.shards)


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "txt"])
def test_selection_reads_every_format(tmp_path: Path, kind: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / f"a.{kind}"
    separator = {"csv": ",", "tsv": "\t"}.get(kind, "")
    if kind == "parquet":
        table = pa.table({"text": [text for text, _ in GOOD], "label": [label for _, label in GOOD]})
        pq.write_table(table, path, row_group_size=4)
    elif kind == "txt":
        path.write_text("\n".join(text for text, _ in GOOD), encoding="utf-8")
    else:
        path.write_text("\n".join(separator.join(row) for row in [("text", "label"), *GOOD]), encoding="utf-8")
    got = [row.id for row in read(config(path, per_label=2, docs_per_shard=4))]
    assert got == [f"a.{kind}#{row}" for row in (range(2) if kind == "txt" else range(6))]


def test_a_limit_leaves_the_rest_unread(tmp_path: Path) -> None:
    first, second = write_pairs(tmp_path / "1.jsonl", GOOD), write_pairs(tmp_path / "2.jsonl", GOOD)
    made = plan.make_plan(config(first, second, limit=5))
    assert made.sources[str(second)] is None
    assert (made.documents, made.shards[0].rows, made.shards[0].keep) == (5, 5, None)
    write_pairs(second, GOOD[:3])
    assert plan.check_sources(made, config(first, second, limit=5)) == []


# -- many files --------------------------------------------------------------------------------------


def test_many_files_are_planned_in_their_order(tmp_path: Path) -> None:
    sizes = [(number * 7) % 11 for number in range(300)]
    for number, size in enumerate(sizes):
        write_pairs(tmp_path / f"{number:03d}.jsonl", GOOD[:size])
    made = plan.make_plan(config(tmp_path / "*.jsonl", docs_per_shard=4))
    expected = [
        (f"{number:03d}.jsonl", first, min(4, size - first))
        for number, size in enumerate(sizes)
        for first in range(0, size, 4)
    ]
    assert [(shard.name, shard.first_row, shard.rows) for shard in made.shards] == expected
    assert [shard.shard for shard in made.shards] == list(range(len(expected)))
    assert list(made.sources) == [str(tmp_path / f"{number:03d}.jsonl") for number in range(300)]


def test_the_first_file_that_cannot_be_planned_is_named(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number:02d}.csv").write_text("body\nx\n" if number in (31, 33, 49) else "text,label\nx,y\n")
    with pytest.raises(ValueError, match=r"31\.csv has no column 'text'"):
        plan.make_plan(config(tmp_path / "*.csv"))


def test_files_are_looked_at_several_at_once_and_not_far_ahead() -> None:
    both = threading.Barrier(2, timeout=30)
    begun: list[int] = []

    def look(number: int) -> int:
        begun.append(number)
        if number < 2:
            both.wait()  # passed only if the other one is looked at beside it
        return number

    for number, result in making.in_order(look, range(1000)):
        assert number == result
        assert len(begun) <= number + 1 + making._AHEAD
    assert sorted(begun) == list(range(1000))


# -- the file ----------------------------------------------------------------------------------------


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    for chosen in ({}, {"per_label": 3}):
        made = plan.make_plan(config(write_pairs(tmp_path / "a.jsonl", [*GOOD, None]), docs_per_shard=4, **chosen))
        back = plan.Plan.from_parquet(made.to_parquet())
        assert back == made
        assert back.hash == made.hash
        assert made == plan.make_plan(config(tmp_path / "a.jsonl", docs_per_shard=4, **chosen))


def test_the_hash_covers_everything(tmp_path: Path) -> None:
    made = plan.make_plan(config(write_pairs(tmp_path / "a.jsonl", GOOD), docs_per_shard=7))
    first = made.shards[0]
    changes = {
        "shard": 9, "source": "/x", "name": "x", "kind": "txt", "first_row": 1, "rows": 6, "offset": None,
        "keep": (0, 1), "fingerprint": "x", "options": "{}",
    }  # fmt: skip
    assert changes.keys() == {field.name for field in dataclasses.fields(plan.Shard)}
    others = [
        dataclasses.replace(made, shards=(dataclasses.replace(first, **{field: value}), *made.shards[1:]))
        for field, value in changes.items()
    ]
    others += [
        dataclasses.replace(made, shards=made.shards[:-1]),
        dataclasses.replace(made, sources={**made.sources, "/y": None}),
        plan.make_plan(config(tmp_path / "a.jsonl", docs_per_shard=7, max_length=256)),
    ]
    assert len({made.hash, *(other.hash for other in others)}) == len(others) + 1


def test_the_hash_is_that_of_one_line_of_json_per_shard(tmp_path: Path) -> None:
    """Spelt out for speed; this is what it stands for."""
    odd = tmp_path / 'öd "name" \\ 日本.jsonl'
    for chosen in ({}, {"per_label": 2}):
        made = plan.make_plan(config(write_pairs(odd, [*GOOD, None]), docs_per_shard=4, **chosen))
        values = [made.config, list(made.sources.items())]
        fields = [field.name for field in dataclasses.fields(plan.Shard) if field.name != "options"]
        lines = [[getattr(shard, name) for name in fields] for shard in made.shards]
        text = "\n".join(json.dumps(line, sort_keys=True, separators=(",", ":")) for line in [values, *lines])
        assert made.hash == hashlib.sha256(text.encode()).hexdigest()


def test_a_plan_longer_than_a_piece_survives_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "_PIECE", 3)
    paths = [write_pairs(tmp_path / f"{i}.jsonl", GOOD) for i in range(3)]
    for chosen in ({}, {"per_label": 13}):
        made = plan.make_plan(config(*paths, "demo", docs_per_shard=4, **chosen))
        assert len(made.shards) > 10
        back = plan.Plan.from_parquet(made.to_parquet())
        assert back == made
        assert {id(shard.source) for shard in back.shards[:3]} == {id(back.shards[0].source)}, "strings are shared"


def test_a_shard_is_small_and_travels(tmp_path: Path) -> None:
    shard = plan.make_plan(config(write_pairs(tmp_path / "a.jsonl", GOOD))).shards[0]
    assert not hasattr(shard, "__dict__")
    assert pickle.loads(pickle.dumps(shard)) == shard


def test_a_damaged_plan_is_refused(tmp_path: Path) -> None:
    made = plan.make_plan(config(write_pairs(tmp_path / "a.jsonl", GOOD)))
    forged = dataclasses.replace(made, config={**made.config, "max_length": 1})
    # The hash is computed once, so this writes the content of one plan under the hash of another.
    forged.__dict__["hash"] = made.hash
    with pytest.raises(ValueError, match="the plan is damaged"):
        plan.Plan.from_parquet(forged.to_parquet())


def test_reading_a_plan_starts_no_scanner(tmp_path):
    """Its threads may outlive the interpreter, which then aborts: a finished collect would exit with -6."""
    (tmp_path / "plan.parquet").write_bytes(plan.Plan(shards=(), config={}).to_parquet())
    program = (
        "import pathlib, sys; from collector.data.plan import Plan\n"
        "Plan.from_parquet(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "assert 'pyarrow.dataset' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "plan.parquet")], check=True)
