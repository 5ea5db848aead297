"""The campaign: which scenarios are played how often, with which seeds, and the figures at the end."""

from __future__ import annotations

import dataclasses
import inspect
import time
import traceback
from collections import Counter
from typing import TYPE_CHECKING

from tests.chaos import damage, scenarios, toy
from tests.chaos.stage import Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    Scenario = Callable[[Stage, int], None]

KILLING: dict[str, Scenario] = {
    "killed in the protocol": scenarios.in_the_protocol,
    "killed at any moment": scenarios.at_any_moment,
    "driver killed": scenarios.of_the_driver,
    "two drivers": scenarios.two_drivers,
    "demo model": damage.demo_model,
    "interrupted": scenarios.of_patience,
    "nodes lost": scenarios.nodes,
    "two parts": scenarios.two_parts,
}
"""Among these the kills that were asked for are shared out."""
FAILING: dict[str, Scenario] = {
    "store that refuses": scenarios.of_the_store,
    "no space left": scenarios.of_space,
    "small disk": damage.small_disk,
    "poisoned shard": damage.poison,
    "NaN router": damage.not_a_number,
    "damaged files": damage.planted,
}
SCENARIOS = KILLING | FAILING
LEAST_SHARDS = 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """What one run of the campaign came to."""

    scenario: str
    seconds: float
    launches: int
    kills: Counter[str]
    """By point of the protocol, or by whom."""
    errors: int
    """Faults that were no kills."""
    shards: int
    rows: int
    violations: tuple[str, ...]


def cast(runs: int, kills: int) -> list[tuple[str, int]]:
    """Scenario and kills of each run: every scenario in turn, then those that kill again and again."""
    names = list(SCENARIOS)[:runs]
    names += [list(KILLING)[i % len(KILLING)] for i in range(runs - len(names))]
    killing = [name in KILLING for name in names]
    each, more = divmod(kills, sum(killing))
    before = [sum(killing[:i]) for i in range(len(names))]
    return [(name, each + (before[i] < more) if killing[i] else 0) for i, name in enumerate(names)]


def play(name: str, folder: Path, *, seed: int, kills: int, model: Path) -> Figures:
    """One run; an error of a scenario is a violation too."""
    started = time.monotonic()
    stage = Stage(folder, seed=seed, shards=max(LEAST_SHARDS, 3 * kills), model=model)
    try:
        SCENARIOS[name](stage, kills)
        if not stage.audited:
            stage.audit()
    except Exception:  # noqa: BLE001 - the campaign goes on, and fails in the end
        stage.verdict.violations.append(traceback.format_exc())
    finally:
        stage.end()
    fired = stage.board.fired()
    inside = Counter({point: count for (action, point), count in fired.items() if action == "kill"})
    return Figures(
        scenario=name, seconds=time.monotonic() - started, launches=stage.launches, kills=inside + stage.kills,
        errors=fired.total() - inside.total(), shards=stage.verdict.shards, rows=stage.verdict.rows,
        violations=tuple(stage.verdict.violations),
    )  # fmt: skip


def campaign(folder: Path, *, seed: int, runs: int, kills: int, only: str | None = None) -> Iterator[Figures]:
    """Plays all runs, one after the other, each in a folder of its own below `folder`."""
    plan = cast(runs, kills) if only is None else [(only, kills // runs if only in KILLING else 0)] * runs
    models = [toy.write_model(folder / f"model-{each}", seed=seed * 2 + each) for each in range(2)]
    for number, (name, share) in enumerate(plan):
        own = folder / f"{number:03d}-{name.replace(' ', '-')}"
        yield play(name, own, seed=seed * 10_000 + number, kills=share, model=models[number % 2])


def line(figures: Figures) -> str:
    """One run in one line."""
    broken = "" if not figures.violations else "".join(f"\n    VIOLATION {what}" for what in figures.violations)
    return (f"{figures.scenario:24}{figures.launches:9}{figures.kills.total():7}{figures.errors:8}{figures.shards:8}"
            f"{figures.rows:10,}{len(figures.violations):12}{figures.seconds:8.0f} s{broken}")  # fmt: skip


HEADER = "scenario".ljust(24) + " launches  kills  errors  shards      rows  violations      time"


def table(all_figures: Sequence[Figures]) -> str:
    """Sums, then kills by place."""
    kills = sum((figures.kills for figures in all_figures), Counter())
    total = Figures(
        scenario=f"{len(all_figures)} runs", seconds=sum(f.seconds for f in all_figures), kills=kills,
        launches=sum(f.launches for f in all_figures), errors=sum(f.errors for f in all_figures),
        shards=sum(f.shards for f in all_figures), rows=sum(f.rows for f in all_figures),
        violations=tuple(what for f in all_figures for what in f.violations),
    )  # fmt: skip
    places = [f"  {count:4}  {place}" for place, count in sorted(kills.items())]
    return "\n".join([HEADER, line(dataclasses.replace(total, violations=())), "kills by place:", *places,
                      f"violations: {len(total.violations)}"])  # fmt: skip


def explain(name: str) -> str:
    """What a scenario does."""
    return inspect.getdoc(SCENARIOS[name]) or ""
