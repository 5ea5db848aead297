"""What `collector status` tells of a run: how far it is, what failed, how it goes on, and what a paper says of it."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from collector import __main__ as cli
from collector.config import DataConfig, ModelConfig
from collector.look import terminal
from collector.look.summary import summarize
from collector.store.run_directory import SUCCESS, RunDirectory
from collector.store.totals import Totals
from tests.helpers.runs import collect_here, run_config, write_jsonl

FAILURE = {"shard": 1, "source": "texts.jsonl", "first_row": 8, "rows": 8, "attempts": 3, "left_out": True,
           "error": "ValueError: unreadable", "traceback": "Traceback\n  ValueError: unreadable",
           "time": "2026-01-01T00:00:00Z", "node": "n7"}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_folder, tiny_model) -> Path:
    """A complete run of 3 shards with 20 documents in 2 labels, one row of which is empty."""
    folder = tmp_path_factory.mktemp("status")
    texts = write_jsonl(folder / "texts.jsonl", 19)
    with texts.open("a") as file:
        file.write('{"text": "", "label": "en"}\n')
    config = run_config(DataConfig(data=(str(texts),), docs_per_shard=8), ModelConfig(model=str(tiny_folder)),
                        max_length=16)  # fmt: skip
    collect_here(folder / "run", config, loaded=tiny_model)
    return folder / "run"


@pytest.fixture
def half(finished, tmp_path) -> RunDirectory:
    """The same run before its second shard was committed."""
    shutil.copytree(finished, tmp_path / "half")
    run = RunDirectory(tmp_path / "half")
    for name in ("commits/000001.json", SUCCESS):
        run.store.delete(name)
    return run


def commit_the_rest(run: RunDirectory, finished: Path) -> None:
    for name in ("commits/000001.json", SUCCESS):
        run.store.put_new(name, (finished / name).read_bytes())


def test_a_failed_shard_is_told_with_its_traceback_and_the_way_on(half, capsys):
    half.record_failure(1, FAILURE)
    assert not terminal.status(half)
    said = capsys.readouterr().out
    assert "incomplete, 1 shards to go" in said
    assert "shard 1 failed after 3 attempts, left out (texts.jsonl, rows from 8):" in said
    assert "Traceback\n  ValueError: unreadable" in said
    assert "--retry-failed tries" not in said.split("Run the same")[0]
    assert "Run the same collect command again to resume; with --retry-failed it tries again what was left out" in said


def test_a_failure_of_a_shard_that_was_committed_after_all_is_none(finished, half, capsys):
    half.record_failure(1, FAILURE)
    commit_the_rest(half, finished)
    assert terminal.status(half)
    assert "failed" not in capsys.readouterr().out


def test_the_status_says_where_the_devices_time_went(finished, capsys):
    terminal.status(RunDirectory(finished))
    assert "the device waited" in capsys.readouterr().out


def test_totals_that_are_refreshed_read_only_what_is_new(finished, half):
    totals = Totals.of(half)
    read = []
    real = half.read_commit
    half.read_commit = lambda shard: read.append(shard) or real(shard)
    totals.refresh(half)
    assert read == []
    commit_the_rest(half, finished)
    totals.refresh(half)
    assert read == [1]
    at_once = Totals.of(RunDirectory(finished))
    assert at_once.committed == {0, 1, 2}
    assert dataclasses.replace(totals, seconds=at_once.seconds) == at_once
    assert totals.seconds == pytest.approx(at_once.seconds)


# ---- --watch ----


@pytest.mark.parametrize(
    ("arguments", "seconds"),
    [(["r", "--watch"], 5), (["--watch", "r"], 5), (["r", "--watch", "0.5"], 0.5), (["r"], None),
     (["--watch", "2", "r"], 2)],
)  # fmt: skip
def test_watch_takes_seconds_or_none(arguments, seconds):
    assert cli.parse(["status", *arguments]) == cli.Status(run_="r", watch=seconds)


def test_seconds_must_be_positive(capsys):
    with pytest.raises(SystemExit):
        cli.parse(["status", "r", "--watch", "0"])
    assert "--watch takes seconds, got 0" in capsys.readouterr().err


def watching(run: RunDirectory) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-m", "collector", "status", run.root, "--watch", "0.2"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    for line in process.stdout:
        if "to resume" in line:
            return process
    raise AssertionError(process.communicate())


def test_a_watch_ends_when_the_run_is_complete(finished, half):
    process = watching(half)
    commit_the_rest(half, finished)
    said, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "3 of 3" in said
    assert "tokens/s since the last look" in said


def test_a_watch_ends_when_all_that_is_left_has_failed(half):
    process = watching(half)
    time.sleep(0.5)
    assert process.poll() is None, "the shard may still be in work"
    half.record_failure(1, FAILURE)
    said, errors = process.communicate(timeout=30)
    assert process.returncode == 1, errors
    assert "shard 1 failed" in said


def test_ctrl_c_ends_a_watch(half):
    process = watching(half)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == "collector: interrupted\n"


# ---- --summary ----


def test_the_summary_names_what_a_paper_has_to_name(finished, tiny_folder):
    run = RunDirectory(finished)
    text, complete = summarize(run)
    card, totals = run.read_json("run.json"), Totals.of(run)
    assert complete
    paragraph, _, table = text.partition("\n\n")
    assert f"{totals.tokens:,} tokens of 19 documents in 2 languages or other labels" in paragraph
    assert "3 layers, top-2 of 6" in paragraph
    assert f"Documents longer than 16 tokens were cut there ({totals.truncated:,} of them)" in paragraph
    assert totals.truncated > 0
    assert "1 rows were skipped (" in paragraph
    rows = dict(line.strip("| ").split(" | ", 1) for line in table.splitlines()[2:])
    assert rows["model"] == str(tiny_folder)
    assert rows["weights"] == f"pretrained, fingerprint {card['model']['fingerprint']}"
    assert "float32" in rows["quantization"]
    assert rows["labels"] == "en 10, ko 9"
    assert rows["maximum length"].startswith("16 tokens")
    assert rows["hardware"] == "the CPUs of 1 node"
    assert f"torch {card['versions']['torch']}" in rows["versions"]
    assert rows["plan"] == f"{card['plan_hash']} (3 shards)"
    assert float(rows["replica-hours"].split(",")[0]) == pytest.approx(totals.replica_hours, abs=0.005)
    assert totals.replica_hours > 0


def test_the_summary_of_an_unfinished_run_says_so(half):
    text, complete = summarize(half)
    assert not complete
    assert "The run is incomplete: 2 of 3 shards are committed." in text


def test_a_run_without_a_model_yet_has_no_summary(half):
    half.store.delete("run.json")
    with pytest.raises(FileNotFoundError, match=r"no run\.json yet"):
        summarize(half)
