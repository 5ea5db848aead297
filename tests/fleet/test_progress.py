"""What a person sees while a run goes on."""

from __future__ import annotations

import io
import json
import os
import sys

import pytest
from rich.console import Console

from collector.fleet import progress
from collector.store.run_directory import Commit, Skipped


def commit(documents: int, tokens: int, bad: int = 0) -> Commit:
    return Commit(shard=0, attempt="a", plan_hash="p", files={}, documents=documents, tokens=tokens, rows=tokens,
                  characters=0, truncated=0, skipped={"empty text": Skipped(count=bad, examples=())}, batches=1,
                  padded_tokens=2 * tokens, seconds={}, node="n")  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_rates_and_eta_count_this_launch_only(clock):
    tally = progress.Tally(shards=4, documents=400, started=1000.0)
    tally.add(commit(100, 5000), before=True)
    assert "ETA" not in tally.line(), "nothing to extrapolate from yet"
    clock[0] += 10
    tally.add(commit(90, 2000, bad=10))
    assert tally.line() == (
        "shards 2/4 · documents 200/400 · 10 of them rejected · tokens 7,000 · 200 tokens/s · padding efficiency 0.50 "
        "· ETA 0:20"
    )
    tally.shards_failed = 1
    assert "failed 1" in tally.line()


def test_elsewhere_than_on_a_terminal_there_is_a_plain_line_every_few_seconds(clock):
    out = io.StringIO()
    tally = progress.Tally(shards=1, documents=10)
    with progress.ProgressView(tally, Console(file=out, width=200)) as view:
        for _ in range(11):
            clock[0] += 1
            view.tick()
    lines = out.getvalue().splitlines()
    assert len(lines) == 3, "after 5 and 10 seconds, and at the end"
    assert all(line.startswith("shards 0/1") for line in lines)
    assert "\x1b" not in out.getvalue()


def test_on_request_every_line_is_a_json_object(clock):
    out = io.StringIO()
    tally = progress.Tally(shards=2, documents=10, started=1000.0)
    with progress.ProgressView(tally, Console(file=out, width=40, force_terminal=True), as_json=True) as view:
        clock[0] += 4
        tally.add(commit(5, 1000))
        view.say("replica: ready [bold]\n" + "x" * 100, event="replica_ready", node="n1")
    said, line = [json.loads(line) for line in out.getvalue().splitlines()]
    assert said.pop("time") == line.pop("time")
    assert said == {"event": "replica_ready", "message": "replica: ready [bold]\n" + "x" * 100, "node": "n1"}
    assert line == {
        "event": "progress", "shards": 2, "shards_done": 1, "shards_failed": 0, "documents": 10, "documents_done": 5,
        "rejected": 0, "tokens": 1000, "tokens_per_second": 250.0, "padding_efficiency": 0.5, "seconds_left": 4.0,
        "note": "starting replicas",
    }  # fmt: skip


def test_shards_of_other_drivers_count_without_a_part_in_the_rate(clock):
    tally = progress.Tally(shards=4, documents=40, started=1000.0)
    clock[0] += 10
    tally.add(commit(10, 1000))
    tally.add_unread(10)
    assert tally.line() == (
        "shards 2/4 · documents 20/40 · tokens 1,000 · 100 tokens/s · padding efficiency 0.50 · ETA 0:20"
    )


def test_on_a_terminal_there_is_a_live_bar():
    out = io.StringIO()
    with progress.ProgressView(progress.Tally(shards=3, documents=10), Console(file=out, force_terminal=True)) as view:
        view.tick()
    assert "shards 0/3" in out.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61, "1:01"), (3725, "1:02:05"), (-3, "0:00")])
def test_clock(seconds, text):
    assert progress._clock(seconds) == text


def test_without_a_token_there_is_neither_a_rate_nor_an_efficiency():
    tally = progress.Tally(shards=2, documents=20)
    assert tally.line() == "shards 0/2 · documents 0/20"
    tally.add(commit(0, 0, bad=10))
    assert tally.line().startswith("shards 1/2 · documents 10/20 · 10 of them rejected · ETA")


def test_shares_add_up_and_the_longest_stage_comes_first():
    seconds = {"read": 3.0, "forward": 20.0, "idle": 60.0, "tokenize": 6.0, "encode": 120.0, "publish": 1.0}
    assert progress.shares(seconds) == (
        "encode 80.0 % · forward 13.3 % · tokenize 4.0 % · read 2.0 % · publish 0.7 % of the work; "
        "the device waited 75.0 % of its time"
    )


@pytest.mark.parametrize(
    ("seconds", "line"),
    [({}, ""), ({"idle": 2.0}, ""), ({"forward": 3.0, "read": 1.0}, "forward 75.0 % · read 25.0 % of the work")],
)
def test_shares_of_runs_that_recorded_less(seconds, line):
    assert progress.shares(seconds) == line


# ---- what cannot be written ----


@pytest.fixture
def nobody_reads(monkeypatch):
    """A standard error whose reader is gone."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", encoding="utf-8") as stream:  # noqa: PTH123  # a descriptor has no path
        monkeypatch.setattr(sys, "stderr", stream)
        yield
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), write)  # closing flushes what is left


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.usefixtures("nobody_reads")
def test_a_view_that_nobody_reads_disturbs_nobody(clock, as_json):
    with progress.ProgressView(progress.Tally(shards=1, documents=10), as_json=as_json) as view:
        view.say("a replica is ready")
        clock[0] += 10
        view.tick()
        work_goes_on = True
    assert work_goes_on


def test_a_console_that_fails_is_told_once_and_errors_of_the_run_pass(clock, capsys):
    class Full(io.StringIO):
        def write(self, _):
            raise OSError(28, "No space left on device")

    def watched():
        with progress.ProgressView(progress.Tally(shards=1, documents=10), Console(file=Full())) as view:
            view.say("one")
            clock[0] += 10
            view.tick()
            raise KeyError("of the run")

    with pytest.raises(KeyError, match="of the run"):
        watched()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("messages and progress fail, and the run goes on without them (OSError: ")
    assert "No space left" in line
