"""The plan: deterministic, complete, hashed to the last row number, and refused when a source changed."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collector import plan, sources
from collector.config import CaptureConfig, DataConfig, ModelConfig, RunConfig
from collector.sources import BadRow, Document

if TYPE_CHECKING:
    from pathlib import Path

GOOD = [(f"text {i}", f"l{i % 3}") for i in range(20)]


def config(*specs: object, max_length: int = 512, **data) -> RunConfig:
    settings = DataConfig(data=tuple(map(str, specs)), **data)
    return RunConfig(data=settings, model=ModelConfig(), capture=CaptureConfig(max_length=max_length), device="cpu")


def write(path: Path, rows: list[tuple[str, str] | None]) -> Path:
    """JSON lines; None is a row that is not JSON."""
    lines = ["{" if row is None else json.dumps({"text": row[0], "label": row[1]}) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


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
    paths = [write(folder / f"{number}.jsonl", content) for number, content in enumerate(files)]
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
    first, second = write(tmp_path / "1.jsonl", GOOD), write(tmp_path / "2.jsonl", GOOD)
    made = plan.make_plan(config(first, second, limit=5))
    assert made.sources[str(second)] is None
    assert (made.documents, made.shards[0].rows, made.shards[0].keep) == (5, 5, None)
    write(second, GOOD[:3])
    assert plan.check_sources(made, config(first, second, limit=5)) == []


# -- the file ----------------------------------------------------------------------------------------


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    for chosen in ({}, {"per_label": 3}):
        made = plan.make_plan(config(write(tmp_path / "a.jsonl", [*GOOD, None]), docs_per_shard=4, **chosen))
        back = plan.Plan.from_parquet(made.to_parquet())
        assert back == made
        assert back.hash == made.hash
        assert made == plan.make_plan(config(tmp_path / "a.jsonl", docs_per_shard=4, **chosen))


def test_the_hash_covers_everything(tmp_path: Path) -> None:
    made = plan.make_plan(config(write(tmp_path / "a.jsonl", GOOD), docs_per_shard=7))
    first = made.shards[0]
    changes = {
        "shard": 9, "source": "/x", "name": "x", "kind": "txt", "first_row": 1, "rows": 6, "offset": None,
        "keep": (0, 1), "fingerprint": "x",
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


def test_a_damaged_plan_is_refused(tmp_path: Path) -> None:
    made = plan.make_plan(config(write(tmp_path / "a.jsonl", GOOD)))
    forged = dataclasses.replace(made, config={**made.config, "max_length": 1})
    # The hash is computed once, so this writes the content of one plan under the hash of another.
    forged.__dict__["hash"] = made.hash
    with pytest.raises(ValueError, match="the plan is damaged"):
        plan.Plan.from_parquet(forged.to_parquet())


# -- resuming ----------------------------------------------------------------------------------------


def test_differences_are_told_as_flags() -> None:
    old = {"max_length": 512, "data": ["a", "b"], "layers": None, "store": [], "gone": 1}
    new = {"max_length": 256, "data": ["a"], "layers": [1, 2], "store": [], "limit": None}
    assert plan.differences(old, new) == [
        "--max-length was 512, is now 256",
        "--data was a b, is now a",
        "--layers was not given, is now 1 2",
        "--gone was 1, is now not given",
    ]
    assert plan.differences(old, dict(old)) == []


def test_sources_are_compared_with_the_plan(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write(tmp_path / f"{name}.jsonl", GOOD)
    settings = config(tmp_path / "*.jsonl", "demo")
    made = plan.make_plan(settings)
    assert plan.check_sources(made, settings) == []
    (tmp_path / "a.jsonl").unlink()
    write(tmp_path / "b.jsonl", GOOD[:-1])
    write(tmp_path / "d.jsonl", GOOD)
    assert plan.check_sources(made, settings) == [
        f"{tmp_path}/a.jsonl is gone", f"{tmp_path}/d.jsonl has been added", f"{tmp_path}/b.jsonl has changed"
    ]  # fmt: skip
    assert plan.check_sources(made, config(tmp_path / "x.jsonl"))[0].endswith(f"no file matches {tmp_path}/x.jsonl")


def test_a_source_that_changed_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD)
    settings = config(path, docs_per_shard=8)
    made = plan.make_plan(settings)
    write(path, [("TEXT 0", "l0"), *GOOD[1:]])
    with pytest.raises(ValueError, match=r"source changed since the plan was made: .*a\.jsonl"):
        list(plan.read_shard(made.shards[1], settings.data))


def test_rows_that_are_missing_are_not_passed_over(tmp_path: Path) -> None:
    """A change in the middle of a big file escapes the fingerprint, a lost row does not."""
    path = write(tmp_path / "a.jsonl", GOOD)
    settings = config(path)
    shard = plan.make_plan(settings).shards[0]
    write(path, GOOD[:-1])
    now = sources.fingerprint(sources.resolve(settings.data)[0])
    with pytest.raises(ValueError, match="19 of the 20 rows of shard 0"):
        list(plan.read_shard(dataclasses.replace(shard, fingerprint=now), settings.data))


@pytest.mark.parametrize("place", [0, 2_500_000])
def test_the_fingerprint_sees_both_ends_of_a_big_file(tmp_path: Path, place: int) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 3_000_000)
    source = sources.resolve(config(path).data)[0]
    before = sources.fingerprint(source)
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"y")
    assert sources.fingerprint(source) != before
    assert before.startswith("size:3000000-sha256:")


def test_reading_a_plan_starts_no_scanner(tmp_path):
    """Its threads may outlive the interpreter, which then aborts: a finished collect would exit with -6."""
    (tmp_path / "plan.parquet").write_bytes(plan.Plan(shards=(), config={}).to_parquet())
    program = (
        "import pathlib, sys; from collector.plan import Plan\n"
        "Plan.from_parquet(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "assert 'pyarrow.dataset' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "plan.parquet")], check=True)
