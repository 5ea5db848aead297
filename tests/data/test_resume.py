"""Sources that are not what the plan was made of are named, and not read."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest

from collector.data import plan, sources
from tests.helpers.documents import GOOD, config, write_pairs

if TYPE_CHECKING:
    from pathlib import Path


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
        write_pairs(tmp_path / f"{name}.jsonl", GOOD)
    settings = config(tmp_path / "*.jsonl", "demo")
    made = plan.make_plan(settings)
    assert plan.check_sources(made, settings) == []
    (tmp_path / "a.jsonl").unlink()
    write_pairs(tmp_path / "b.jsonl", GOOD[:-1])
    write_pairs(tmp_path / "d.jsonl", GOOD)
    assert plan.check_sources(made, settings) == [
        f"{tmp_path}/a.jsonl is gone", f"{tmp_path}/d.jsonl has been added", f"{tmp_path}/b.jsonl has changed"
    ]  # fmt: skip
    assert plan.check_sources(made, config(tmp_path / "x.jsonl"))[0].endswith(f"no file matches {tmp_path}/x.jsonl")


def test_a_source_that_changed_is_not_read(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "a.jsonl", GOOD)
    settings = config(path, docs_per_shard=8)
    made = plan.make_plan(settings)
    write_pairs(path, [("TEXT 0", "l0"), *GOOD[1:]])
    with pytest.raises(ValueError, match=r"source changed since the plan was made: .*a\.jsonl"):
        list(plan.read_shard(made.shards[1], settings.data))


def test_rows_that_are_missing_are_not_passed_over(tmp_path: Path) -> None:
    """A change in the middle of a big file escapes the fingerprint, a lost row does not."""
    path = write_pairs(tmp_path / "a.jsonl", GOOD)
    settings = config(path)
    shard = plan.make_plan(settings).shards[0]
    write_pairs(path, GOOD[:-1])
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
