"""Everything that one run of the campaign needs: toy model, documents, board, drivers, and the audit at the end.

Drivers are subprocesses, `python -m collector collect` as a user types it. All processes of a run carry the board's
folder in their environment, so that the run's family is found whatever became of the parents.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil

from tests.chaos import toy
from tests.chaos.faults import Board
from tests.chaos.oracle import Oracle, QuietRun
from tests.chaos.verdict import Verdict

REPOSITORY = Path(__file__).parents[2]
PER_SHARD = 3
PATIENCE = 240
"""Seconds that a launch may take."""
MANY_ATTEMPTS = 60


class Stage:
    """One run: its folder, its settings, its processes."""

    def __init__(self, folder: Path, *, seed: int, shards: int, model: Path) -> None:
        self.folder, self.seed, self.shards = folder, seed, shards
        self.rng = random.Random(seed)
        self.source = toy.write_documents(folder / "texts.jsonl", shards * PER_SHARD, seed)
        self.data: tuple[str, ...] = (str(self.source),)
        self.model: Path | str = model
        self.root = folder / "run"
        self.board = Board(folder / "board")
        self.oracle: Oracle | QuietRun = Oracle(model, self.source, PER_SHARD)
        self.verdict = Verdict()
        self.audited = False
        self.never_complete = False
        """Whether a shard of this run cannot be collected."""
        self.launches = 0
        self.kills: Counter[str] = Counter()
        """From outside: who -> how many; those from inside are the board's."""
        self.drivers: list[subprocess.Popen] = []
        self.environment = os.environ | {
            "CHAOS_BOARD": str(self.board.folder), "CHAOS_ROOT": str(self.root),
            "PYTHONPATH": f"{Path(__file__).parent / 'site'}:{REPOSITORY}", "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": f"{self.rng.getrandbits(256):064x}",
        }  # fmt: skip

    # -- driving ---------------------------------------------------------------------------------------

    def command(self, *flags: str, max_attempts: int = MANY_ATTEMPTS) -> list[str]:
        """What a user types."""
        return [sys.executable, "-m", "collector", "collect", "--out", str(self.root), "--data", *self.data,
                "--model", str(self.model), "--docs-per-shard", str(PER_SHARD), "--max-length", str(toy.MAX_LENGTH),
                "--cpus-per-replica", "1", "--replicas", "2", "--max-attempts", str(max_attempts), *flags]  # fmt: skip

    def launch(self, *flags: str, max_attempts: int = MANY_ATTEMPTS) -> subprocess.Popen:
        """Starts a driver and returns at once; its output goes to a file."""
        self.launches += 1
        with (self.folder / f"launch-{self.launches}.log").open("wb") as log:
            process = subprocess.Popen(self.command(*flags, max_attempts=max_attempts), stdout=log, stderr=log,
                                       env=self.environment, cwd=self.folder)  # fmt: skip
        self.drivers.append(process)
        return process

    def log(self) -> str:
        """What all launches said."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("launch-*.log")))

    def wait(self, process: subprocess.Popen) -> int | None:
        """A driver's exit status; None, and a violation, if it hangs."""
        try:
            return process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.verdict.demand(False, f"launch {self.launches} hangs")
            process.kill()
            return None

    def run(self, *flags: str, max_attempts: int = MANY_ATTEMPTS) -> int | None:
        """One launch from start to end."""
        return self.wait(self.launch(*flags, max_attempts=max_attempts))

    def resume_until_complete(self, *flags: str, launches: int = 5) -> None:
        """The same command again and again, a bounded number of times."""
        for _ in range(launches):
            status = self.run(*flags)
            if status is None or (self.complete and status == 0):
                break
        self.verdict.demand(self.complete and status == 0, f"not complete after {launches} more launches: {status}")

    def tool(self, *arguments: str) -> tuple[int, str]:
        """Another command of the collector: exit status and output."""
        done = subprocess.run([sys.executable, "-m", "collector", *arguments], capture_output=True, text=True,
                              timeout=PATIENCE, check=False, cwd=REPOSITORY)  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    # -- watching and killing --------------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        return (self.root / "_SUCCESS").exists()

    @property
    def commits(self) -> list[Path]:
        return sorted((self.root / "commits").glob("*.json"))

    def wait_for_commits(self, count: int, process: subprocess.Popen) -> None:
        """Returns when there are so many, or when the driver has ended."""
        deadline = time.monotonic() + PATIENCE
        while len(self.commits) < count and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)

    def family(self) -> list[psutil.Process]:
        """All living processes of the run, other than the campaign's own."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and self._ours(process):
                    found.append(process)
        return found

    def _ours(self, process: psutil.Process) -> bool:
        return process.pid != os.getpid() and process.environ().get("CHAOS_BOARD") == str(self.board.folder)

    def replicas(self) -> list[psutil.Process]:
        """Replicas that live, loading or at work."""
        found = []
        for pid in self.board.workers():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE and self._ours(process):
                    found.append(process)
        return found

    def kill_a_replica(self, process: subprocess.Popen) -> bool:
        """Waits for one to live, then SIGKILL; False if the driver ended first."""
        while process.poll() is None:
            if living := self.replicas():
                self.kill(self.rng.choice(sorted(living, key=lambda each: each.pid)), "replica, from outside")
                return True
            time.sleep(0.02)
        return False

    def kill(self, process: psutil.Process | subprocess.Popen, who: str) -> None:
        """SIGKILL, counted."""
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            process.send_signal(signal.SIGKILL)
            self.kills[who] += 1

    # -- the audit -------------------------------------------------------------------------------------

    def audit(self) -> Verdict:
        """Everything that must hold of a run that came to its end."""
        self.audited = True
        self._ask_the_oracle()
        unfired = self.board.unfired()
        # A process that is killed from outside may take with it the fault that it had just come to.
        self.verdict.demand(len(unfired) <= self.kills.total(), f"faults that never happened: {unfired}")
        self.no_process_is_left()
        if not self.never_complete:
            left = sorted(path.name for path in (self.root / "failures").glob("*.json"))
            self.verdict.demand(not left, f"failure records left: {left}")
        status, output = self.tool("verify", str(self.root))
        self.verdict.demand(status == int(self.never_complete), f"collector verify: {output}")
        status, output = self.tool("gc", str(self.root), "--older-than", "0")
        self.verdict.demand(status == 0, f"collector gc: {output}")
        _, output = self.tool("sql", str(self.root), "select count(*) from routing", "--format", "csv")
        self.verdict.demand(output.split()[-1:] == [str(self.verdict.rows)], f"rows by collector sql: {output}")
        self._find_nothing_uncommitted()
        self._ask_the_oracle()
        return self.verdict

    def _ask_the_oracle(self) -> None:
        found = self.oracle.check(self.root)
        self.verdict.rows, self.verdict.shards = found.rows, found.shards
        self.verdict.violations += found.violations

    def _find_nothing_uncommitted(self) -> None:
        """Of all files, hidden ones too, in the folders where replicas write."""
        records = {path: json.loads(path.read_bytes()) for path in self.commits}
        committed = {self.root / part["path"] for record in records.values() for part in record["files"].values()}
        folders = ("data", "rejects", "commits", "failures", ".scratch")
        there = {path for folder in folders for path in (self.root / folder).rglob("*") if path.is_file()}
        reported = {path for path in (self.root / "failures").glob("*.json") if self.never_complete}
        odd = sorted(str(path.relative_to(self.root)) for path in there ^ committed ^ set(records) ^ reported)
        self.verdict.demand(not odd, f"after gc, files are not those that are committed: {odd}")

    def no_process_is_left(self, patience: float = 60) -> None:
        """Waits for Ray's own agents to notice that their driver is gone; ends, by pid, what stays."""
        deadline = time.monotonic() + patience
        while (left := self.family()) and time.monotonic() < deadline:
            time.sleep(0.2)
        names = sorted(" ".join(process.cmdline()[:2]) for process in left)
        self.verdict.demand(not left, f"processes left: {names}")
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def end(self) -> None:
        """Ends, by pid, whatever an error left running."""
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                process.kill()
        for driver in self.drivers:
            driver.wait(PATIENCE)
