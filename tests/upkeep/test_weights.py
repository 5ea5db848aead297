"""`collector weights`: the table of a run, and the runs that it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from collector.config import DataConfig, ModelConfig
from collector.models.expert_weights import ExpertWeights, cosines, matched
from collector.models.routers import find_routers
from collector.query.warehouse import open_run
from collector.upkeep import orphans, weights
from collector.upkeep.verify import verify
from tests.helpers.command_line import collector
from tests.helpers.runs import collect_here, run_config, write_jsonl


@pytest.fixture
def run(tmp_path, tiny_folder, tiny_model):
    data = DataConfig(data=(str(write_jsonl(tmp_path / "texts.jsonl", 5)),))
    config = run_config(data, ModelConfig(model=str(tiny_folder)), layers=(0, 2))
    return collect_here(tmp_path / "run", config, loaded=tiny_model)


def test_the_table_has_every_pair_of_the_recorded_layers(run, tiny_model) -> None:
    assert "rows; see collector query" in collector("weights", run.root).stdout
    opened = open_run(run.root)
    routers = {router.layer: router for router in find_routers(tiny_model.model)}
    for measure, compare in (("matched", matched), ("cosine", lambda own: cosines(own)["all"])):
        rows = (
            opened.query("weight_similarity", measure=measure).project("layer, expert, other_expert, value").fetchall()
        )
        expected = {layer: compare(ExpertWeights(routers[layer])) for layer in (0, 2)}
        count = len(expected[0])
        assert len(rows) == 2 * count * (count - 1)
        for layer, i, j, value in rows:
            assert value == pytest.approx(expected[layer][i, j], abs=1e-6)
    own = opened.query("weight_similarity", measure="coupling").filter("expert = other_expert").fetchall()
    assert len(own) == 2 * count


def test_a_second_time_nothing_is_done_unless_asked_for(run, monkeypatch) -> None:
    made = weights.make(run, match=False)
    assert open_run(run.root).query("weight_similarity").fetchall() == []  # nothing was matched
    assert collector("weights", run.root).stdout == f"{made.file}: already there\n"
    assert collector("weights", run.root, "--again").returncode == 0
    assert open_run(run.root).query("weight_similarity").fetchall()
    monkeypatch.setattr(weights, "MOST_NEURONS", 1)
    assert "are not matched" in collector("weights", run.root, "--again").stderr


def test_another_model_is_refused(run) -> None:
    info = json.loads(Path(run.root, "run.json").read_text())
    info["model"]["fingerprint"] = 64 * "f"
    Path(run.root, "run.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="has other weights than the run's"):
        weights.make(run)


def test_the_run_stays_sound_and_keeps_the_file(run) -> None:
    weights.make(run)
    assert verify(run).sound
    assert orphans.find(run, 0) == []
