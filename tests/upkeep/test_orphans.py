"""Gc removes what counts for nothing and is old enough, and nothing else."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from collector.store.run_directory import PLAN, DamagedRecordError, RunDirectory
from collector.upkeep import orphans
from tests.helpers.command_line import exit_status
from tests.helpers.runs import attempt

HOUR = 3600


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    """Shard 0 committed, with an orphan of every kind beside it."""
    run = RunDirectory(tmp_path / "run")
    run.store.put(PLAN, b"a plan")
    run.commit(attempt(run, 0, "a"))
    return run


def leave_orphans(run: RunDirectory) -> set[str]:
    root = Path(run.root)
    lost = attempt(run, 0, "b").files["routing"].path
    names = {
        lost, "rejects/000003-c.rejects.parquet", f"data/.x.{'0' * 32}.tmp", f"commits/.000001.json.{'a' * 32}.tmp",
        f"._SUCCESS.{'b' * 32}.tmp", f"failures/.000001.json.{'c' * 32}.tmp", ".scratch/attempt-abc",
    }  # fmt: skip
    (root / ".scratch/attempt-abc/deep").mkdir(parents=True)
    (root / ".scratch/attempt-abc/deep/routing").write_bytes(b"half")
    for name in names - {lost, ".scratch/attempt-abc"}:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"left")
    return names


def age(run: RunDirectory, seconds: float, *below: str) -> None:
    """Makes everything, or what is below these names, this old."""
    then = time.time() - seconds
    for path in [path for name in below or ("",) for path in Path(run.root, name).rglob("*")]:
        os.utime(path, (then, then))


def names(found) -> set[str]:
    return {entry.name for entry in found}


def files(run: RunDirectory) -> set[str]:
    return {str(path.relative_to(run.root)) for path in Path(run.root).rglob("*") if path.is_file()}


def test_orphans_of_every_kind_go_and_nothing_else(run, capsys):
    kept = files(run)
    left = leave_orphans(run)
    Path(run.root, "notes.txt").write_text("mine")
    Path(run.root, ".hidden").write_text("mine")
    Path(run.root, ".scratch/other").mkdir(parents=True)
    age(run, 2 * 24 * HOUR)
    assert names(orphans.find(run, 24 * HOUR)) == left
    assert exit_status("gc", run.root) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in left)
    assert out.splitlines()[-1] == f"removed: {len(left)} orphans, {4 * len(left)} bytes"
    assert files(run) == kept | {"notes.txt", ".hidden"}
    assert Path(run.root, ".scratch/other").is_dir()
    assert not Path(run.root, ".scratch/attempt-abc").exists()
    assert [commit.attempt for commit in run.commits()] == ["a"]


def test_what_is_young_stays(run):
    left = leave_orphans(run)
    age(run, 5 * HOUR)
    age(run, 0.5 * HOUR, "rejects")
    (Path(run.root) / ".scratch/attempt-abc/deep/tokens").write_bytes(b"being written")
    found = names(orphans.find(run, HOUR))
    assert left - found == {"rejects/000003-c.rejects.parquet", ".scratch/attempt-abc"}
    assert names(orphans.find(run, 6 * HOUR)) == set()


def test_what_is_committed_stays_whatever_its_age(run):
    age(run, 1000 * 24 * HOUR)
    assert names(orphans.find(run, HOUR)) == set()


def test_a_dry_run_removes_nothing(run, capsys):
    left = leave_orphans(run)
    before = files(run)
    assert exit_status("gc", run.root, "--older-than", "0", "--dry-run") == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-1].startswith(f"to remove: {len(left)} orphans, ")
    assert "a shard that is being collected now would lose its files" in said.err
    assert files(run) == before


def test_a_part_that_is_committed_while_gc_looks_stays(run, monkeypatch):
    """Files are listed first and records read second: a commit in between saves its parts."""
    late = attempt(run, 1, "late")
    entries = run.store.entries

    def commit_after_listing(prefix: str):
        found = entries(prefix)
        if prefix == "rejects":
            run.commit(late)
        return found

    monkeypatch.setattr(run.store, "entries", commit_after_listing)
    assert names(orphans.find(run, 0)) == set()


def test_nothing_goes_while_a_record_cannot_be_read(run):
    leave_orphans(run)
    run.store.put("commits/000001.json", b'{"files": {"routing": {"path": "data/0000')
    before = files(run)
    with pytest.raises(DamagedRecordError):
        orphans.find(run, 0)
    assert exit_status("gc", run.root, "--older-than", "0") == 2
    assert files(run) == before


def test_parts_of_a_record_that_was_set_aside_are_orphans(run):
    run.set_aside(0)
    assert names(orphans.find(run, 0)) == {"data/000000-a.routing.parquet"}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90m", 5400),
        ("12h", 43200),
        ("1d", 86400),
        ("2w", 1209600),
        ("1.5d", 129600),
        ("0", 0),
        ("0s", 0),
        ("7200s", 7200),
    ],
)
def test_ages_are_read_with_their_unit(text, seconds):
    assert orphans.parse_age(text) == seconds


@pytest.mark.parametrize("text", ["", "1", "d", "-1d", "1 day", "1y", "nan"])
def test_an_age_without_a_meaning_is_refused(text):
    with pytest.raises(ValueError, match=r"takes a number with a unit \(90m, 12h, 1d, 2w\), or 0, got"):
        orphans.parse_age(text)


@pytest.mark.parametrize("text", ["30m", "1s", "0.5h"])
def test_an_age_that_a_shard_in_work_may_have_is_refused(text):
    with pytest.raises(ValueError, match=r"is less than an hour.*Take 1h or more; 0 if nothing is writing"):
        orphans.parse_age(text)


def test_there_must_be_a_run(tmp_path, capsys):
    assert exit_status("gc", str(tmp_path)) == 2
    assert "there is no plan.parquet" in capsys.readouterr().err
