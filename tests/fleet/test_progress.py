"""What a person sees while a run goes on."""

from __future__ import annotations

import io
import json

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
        "shards 2/4 · documents 200/400 · tokens 7,000 · 200 tokens/s · padding efficiency 0.50 · ETA 0:20"
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
        "tokens": 1000, "tokens_per_second": 250.0, "padding_efficiency": 0.5, "seconds_left": 4.0,
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


def test_shares_are_of_the_devices_time_and_stages_that_overlap_may_exceed_it():
    seconds = {"forward": 75.0, "idle": 25.0, "read": 3.0, "tokenize": 6.25, "encode": 120.0, "publish": 0.5}
    assert progress.shares(seconds) == (
        "forward 75.0 % · read 3.0 % · tokenize 6.2 % · encode 120.0 % · publish 0.5 % of the device's time; "
        "device idle 25.0 %"
    )


@pytest.mark.parametrize("seconds", [{}, {"idle": 0.0}, {"forward": 3.0, "read": 1.0}])
def test_runs_that_did_not_record_how_long_the_device_waited_have_no_shares(seconds):
    assert progress.shares(seconds) == ""
