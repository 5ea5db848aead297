"""Scenarios of shards that cannot be collected, and of files that were damaged after they were committed."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from typing import TYPE_CHECKING

from tests.chaos import toy
from tests.chaos.faults import Fault
from tests.chaos.oracle import Oracle, QuietRun

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.chaos.stage import Stage

SMALL_DISK, LARGER_DISK = "500k", "64m"


def poison(stage: Stage, kills: int) -> None:
    """A shard kills whoever reads it: left out after its last attempt, all others committed; later it is retried."""
    assert kills == 0, "it kills by itself"
    shard = stage.rng.randrange(stage.shards)
    stage.board.schedule([Fault(point="read.before", shard=shard)])
    status = stage.run(max_attempts=2)
    _demand_left_out(stage, status, shard, "a poisoned shard")
    deaths = stage.board.fired().total()
    status = stage.run(max_attempts=2)
    stage.verdict.demand(status == 1, f"resumed with a shard left out: status {status}")
    stage.verdict.demand(stage.board.fired().total() == deaths, "a shard left out was tried again unasked")
    stage.board.schedule([])
    stage.resume_until_complete("--retry-failed", launches=1)


def _demand_left_out(stage: Stage, status: int | None, shard: int, what: str) -> None:
    failures = {int(path.stem): json.loads(path.read_bytes()) for path in (stage.root / "failures").glob("*.json")}
    committed = {int(path.stem) for path in stage.commits}
    stage.verdict.demand(status == 1, f"{what}: status {status}")
    stage.verdict.demand(set(failures) == {shard}, f"{what}: failures {sorted(failures)} instead of {shard}")
    stage.verdict.demand(all(failure.get("left_out") for failure in failures.values()), f"{what}: not left out")
    stage.verdict.demand(committed == set(range(stage.shards)) - {shard}, f"{what}: not all others are committed")
    stage.verdict.demand(not stage.complete, f"{what}: the run claims to be complete")


def not_a_number(stage: Stage, kills: int) -> None:
    """A router answers NaN to one byte, which one document holds: its shard fails and is never committed."""
    assert kills == 0, "nobody dies"
    stage.model = toy.write_model(stage.folder / "model", stage.seed, broken_byte=0x7F)
    row = stage.rng.choice(stage.oracle.documents).row
    lines = stage.source.read_text(encoding="utf-8").splitlines()
    lines[row] = json.dumps(json.loads(lines[row]) | {"text": "\x7f and more"})
    stage.source.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    stage.oracle = Oracle(stage.model, stage.source, stage.oracle.per_shard, without=row // stage.oracle.per_shard)
    stage.never_complete = True
    status = stage.run(max_attempts=2)
    _demand_left_out(stage, status, row // stage.oracle.per_shard, "a NaN router")
    failure = json.loads(next((stage.root / "failures").glob("*.json")).read_bytes())
    stage.verdict.demand("not finite" in failure["error"], f"a NaN router is reported as {failure['error']}")


def planted(stage: Stage, kills: int) -> None:
    """A truncated part, a part with one other byte, half a commit record: found by name, mended by collecting again."""
    assert kills == 0, "nobody dies"
    stage.resume_until_complete(launches=1)
    cut, altered, half = stage.rng.sample(range(stage.shards), 3)
    path = _part(stage, cut, "routing")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    path = _part(stage, altered, "tokens")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    record = stage.root / "commits" / f"{half:06d}.json"
    record.write_bytes(record.read_bytes()[:100])
    status, output = stage.tool("verify", str(stage.root))
    stage.verdict.demand(status == 1, f"verify of a damaged run: status {status}")
    for shard in (cut, altered, half):
        stage.verdict.demand(f"shard {shard}" in output or f"{shard:06d}" in output, f"verify does not name {shard}")
    status, output = stage.tool("verify", str(stage.root), "--recollect")
    stage.verdict.demand(not stage.complete, f"still complete after verify --recollect: {output}")
    stage.resume_until_complete(launches=1)


def _part(stage: Stage, shard: int, table: str) -> Path:
    record = json.loads((stage.root / "commits" / f"{shard:06d}.json").read_bytes())
    return stage.root / record["files"][table]["path"]


@contextlib.contextmanager
def _mounted(folder: Path, size: str) -> Iterator[bool]:
    """A file system of a fixed size in memory, where this user may mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def small_disk(stage: Stage, kills: int) -> None:
    """The run's file system fills up, then its operator enlarges it; without root the disk is large from the start."""
    assert kills == 0, "nobody dies"
    with _mounted(stage.root, SMALL_DISK) as mounted:
        if mounted:
            status = stage.run(max_attempts=2)
            stage.verdict.demand(status not in (0, None), f"a full disk: status {status}")
            stage.verdict.demand("No space left" in stage.log(), "a full disk: not said")
            stage.verdict.demand(not stage.complete, "a full disk: the run claims to be complete")
            subprocess.run(["mount", "-o", f"remount,size={LARGER_DISK}", str(stage.root)], check=True)
        stage.resume_until_complete("--retry-failed", launches=2)
        stage.audit()


def demo_model(stage: Stage, kills: int) -> None:
    """The demo model with all recorders over real sentences, killed like the toy, beside a quiet run."""
    from collector.config import DataConfig, ModelConfig
    from tests.chaos.faults import PROTOCOL, draw
    from tests.helpers.runs import collect_here, run_config

    documents = stage.shards * stage.oracle.per_shard
    data = DataConfig(limit=documents, docs_per_shard=stage.oracle.per_shard)
    record, drop = ("outputs", "loss", "similarity", "vocabulary", "effects"), "layer=4 expert={} operation=drop"
    arms = (f"no 31: {drop.format(31)}", f"no 31 #1: {drop.format(44)}")
    config = run_config(
        data, ModelConfig(), max_length=toy.MAX_LENGTH, record=record, sample_tokens=20, arms=arms,
        store=("token_effects",),
    )  # fmt: skip
    stage.oracle = QuietRun(collect_here(stage.folder / "quiet", config, threads=1), stage.oracle.per_shard)
    stage.data, stage.model = ("demo", "--limit", str(documents)), "demo"
    stage.board.schedule(draw(stage.rng, kills, points=PROTOCOL, visits=stage.shards // 3))
    stage.resume_until_complete(
        "--record", *record, "--sample-tokens", "20", "--arms", *arms, "--store", "token_effects", launches=1
    )  # fmt: skip
