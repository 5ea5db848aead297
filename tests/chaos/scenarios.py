"""What happens to the runs of the campaign: each scenario is a function that plays on a stage, and its name.

A scenario gets a fresh run and a number of kills to spend, drives the run to its end and notes what did not hold; the
stage's audit follows. Faults that a scenario brings along (a killed driver, a lost node) come on top of the number.
"""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

from tests.chaos.faults import LAUNCH, PROTOCOL, Fault, draw

if TYPE_CHECKING:
    import subprocess

    from tests.chaos.stage import Stage

STORE = ("publish.routing.before", "publish.routing.after", "publish.tokens.after", "publish.documents.after",
         "fsync.before", "fsync.after", "rename.before", "rename.after", "link.before", "link.after", "commit.before",
         "commit.after")  # fmt: skip
SPACE = ("write.before", "write.after", "publish.tokens.before", "commit.before", "fsync.before", "link.before")
SLOWLY = Fault(point="forward.before", action="slow", seconds=0.15)
"""So that there is a moment to kill somebody in: a run of this size is over in a second."""


def in_the_protocol(stage: Stage, kills: int) -> None:
    """Replicas kill themselves while loading and at named points of the commit protocol; one launch must do."""
    loading = [Fault(point="load.before", visit=2), Fault(point="load.after", visit=3)][: kills // 3]
    at_work = draw(stage.rng, kills - len(loading), points=PROTOCOL, visits=stage.shards // 3)
    stage.board.schedule([*loading, *at_work])
    stage.resume_until_complete(launches=1)


def at_any_moment(stage: Stage, kills: int) -> None:
    """Replicas are killed from outside, loading or at work; one launch must do."""
    stage.board.schedule([SLOWLY])
    driver = stage.launch()
    for _ in range(kills):
        stage.wait_for_commits(len(stage.commits) + stage.rng.randint(0, 1), driver)
        time.sleep(stage.rng.uniform(0, 0.3))
        if not stage.kill_a_replica(driver):
            break
    stage.verdict.demand(stage.wait(driver) == 0 and stage.complete, "one launch was not enough")


def of_the_driver(stage: Stage, kills: int) -> None:
    """`kill -9` of the driver before and after each file that it writes, and in between; replicas live on a while."""
    places = [Fault(point=point, visit=1) for point in LAUNCH]
    stage.board.schedule([SLOWLY, *places, *draw(stage.rng, kills, points=PROTOCOL, visits=stage.shards // 3)])
    for _ in range(4):
        stage.run()
    for _ in range(2):
        driver = stage.launch()
        stage.wait_for_commits(len(stage.commits) + stage.rng.randint(1, 6), driver)
        stage.kill(driver, "driver, from outside")
        stage.wait(driver)
    stage.resume_until_complete(launches=6)


def of_patience(stage: Stage, kills: int) -> None:
    """Ctrl-C, then SIGTERM, then resume: status 130, no traceback, no process left, and done shards stay done."""
    stage.board.schedule([SLOWLY, *draw(stage.rng, kills, points=PROTOCOL, visits=stage.shards // 3)])
    for sign in (signal.SIGINT, signal.SIGTERM):
        driver = stage.launch()
        stage.wait_for_commits(len(stage.commits) + stage.rng.randint(1, 6), driver)
        if driver.poll() is not None:
            break
        driver.send_signal(sign)
        stage.verdict.demand(stage.wait(driver) == 130, f"{sign.name}: status {driver.returncode}")
        stage.verdict.demand("Traceback" not in stage.log(), f"{sign.name}: a traceback")
        stage.no_process_is_left()
    before = {path.name: path.read_bytes() for path in stage.commits}
    stage.resume_until_complete(launches=1)
    same = all((stage.root / "commits" / name).read_bytes() == record for name, record in before.items())
    stage.verdict.demand(same, "a committed shard was committed again")


def _two(stage: Stage, kills: int, one: tuple[str, ...], other: tuple[str, ...]) -> None:
    stage.board.schedule(draw(stage.rng, kills, points=PROTOCOL, visits=stage.shards // 3))
    drivers: list[subprocess.Popen] = [stage.launch(*one), stage.launch(*other)]
    statuses = [stage.wait(driver) for driver in drivers]
    stage.verdict.demand(statuses == [0, 0], f"two drivers ended with {statuses}")


def two_drivers(stage: Stage, kills: int) -> None:
    """The same command twice at once, each with replicas that die."""
    _two(stage, kills, (), ())


def two_parts(stage: Stage, kills: int) -> None:
    """`--part 1/2` and `--part 2/2` at once, each with replicas that die."""
    _two(stage, kills, ("--part", "1/2"), ("--part", "2/2"))


def nodes(stage: Stage, kills: int) -> None:
    """A cluster of two nodes: each loses its raylet in turn, and another joins; one launch must do."""
    from tests.chaos.cluster import Cluster

    stage.board.schedule([SLOWLY, *draw(stage.rng, kills, points=PROTOCOL, visits=stage.shards // 3)])
    with Cluster(stage.environment) as cluster:
        workers = [cluster.add_node(), cluster.add_node()]
        driver = stage.launch("--ray-address", cluster.address)
        for worker in workers:
            stage.wait_for_commits(len(stage.commits) + stage.rng.randint(1, 4), driver)
            stage.kill(cluster.raylet(worker), "raylet")
            cluster.add_node()
        stage.verdict.demand(stage.wait(driver) == 0 and stage.complete, "one launch was not enough")


def of_the_store(stage: Stage, kills: int) -> None:
    """The store refuses, answers after the write happened, or takes its time, for replicas and driver alike."""
    faults = draw(stage.rng, 28, points=STORE, visits=stage.shards // 4, actions=("refuse", "slow"), seconds=0.5)
    once = ("plan.parquet.after", "vocab.parquet.after", "run.json.after", "_SUCCESS.after")
    stage.board.schedule([*faults, *(Fault(point=point, visit=1, action="refuse") for point in once)])
    stage.resume_until_complete(launches=6)
    assert kills == 0, "its faults are no deaths"


def of_space(stage: Stage, kills: int) -> None:
    """No space left on the device while parts and records are written; the attempt fails, the shard does not."""
    stage.board.schedule(draw(stage.rng, 20, points=SPACE, visits=stage.shards // 4, actions=("full",)))
    stage.resume_until_complete(launches=3)
    assert kills == 0, "its faults are no deaths"
