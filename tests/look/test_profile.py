"""`collector profile`: each part is the answer of its query, and what was not recorded is null."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from collector.look.profile import profile
from collector.query import inference
from collector.query.warehouse import open_run
from collector.store.tables import Layer
from tests.helpers.command_line import collector
from tests.helpers.synthetic import random_shard, write_run

LAYERS = (
    Layer(layer=1, n_experts=6, top_k=2), Layer(layer=2, n_experts=5, top_k=1),
    Layer(stack="encoder", layer=2, n_experts=4, top_k=1),
)  # fmt: skip
DOCUMENTS = [("en", 9), ("ko", 12), ("en", 4), ("ko", 3), ("th", 6), ("th", 8)]
WEIGHTS = [
    {"stack": "decoder", "layer": 1, "measure": "matched", "expert": 3, "other_expert": other, "value": value}
    for other, value in ((0, 0.5), (1, 0.75), (2, 0.25))
]


def shard():
    return random_shard(np.random.default_rng(3), LAYERS, DOCUMENTS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = write_run(tmp_path / "run", LAYERS, [shard()], weights=WEIGHTS)
    info = json.loads((path / "run.json").read_text())
    info["model"]["id"] = "synthetic"
    (path / "run.json").write_text(json.dumps(info))
    return path


def test_every_part_is_the_answer_of_its_query(folder: Path) -> None:
    done = collector("profile", str(folder), "--layer", "1", "--expert", "3", "--n", "2", "--resamples", "50")
    found, run = json.loads(done.stdout), open_run(folder)
    assert (found["model"], found["stack"], found["layer"], found["expert"]) == ("synthetic", "decoder", 1, 3)
    assert (found["experts"], found["top_k"], found["complete"]) == (6, 2, True)
    load = run.query("expert_load", layer=1).filter("expert = 3").project("value, n").fetchall()
    assert [(found["load"]["value"], found["load"]["n"])] == load
    intervals = inference.intervals(run, "domain_specialization", layer=1, stack="decoder", resamples=50).to_pylist()
    own = sorted((row for row in intervals if row["expert"] == 3), key=lambda row: -row["value"])[:2]
    for row, label in zip(own, found["labels"], strict=True):
        assert {name: label[name] for name in ("label", "value", "low", "high")} == {
            name: row[name] for name in ("label", "value", "low", "high")
        }
        assert 0 < label["q"] <= 1
    aspects = run.query("expert_profile", layer=1, stack="decoder", expert=3, n=2).fetchall()
    for aspect, name in (("token", "tokens"), ("expert", "companions"), ("position", "positions")):
        assert [item["item"] for item in found[name]] == [row[5] for row in aspects if row[0] == aspect]
    effects = run.query("expert_contribution", layer=1, stack="decoder", pooled=True).filter("expert = 3").fetchall()
    assert {metric: part["value"] for metric, part in found["contribution"].items()} == pytest.approx(
        {row[0]: row[5] for row in effects}
    )
    similar = run.query("expert_similarity", layer=1, stack="decoder", expert=3).fetchall()
    best = sorted((row for row in similar if row[5] is not None), key=lambda row: -row[5])[:2]
    assert [one["other_expert"] for one in found["nearest_by_output"]] == [row[4] for row in best]
    assert [(one["other_expert"], one["value"]) for one in found["nearest_by_weight"]] == [(1, 0.75), (0, 0.5)]
    written = run.query("output_vocabulary", layer=1, stack="decoder", expert=3, n=2).project("token, value").fetchall()
    assert [(one["token"], one["value"]) for one in found["promotes"]] == written
    (attributed,) = run.query("direct_attribution", layer=1, stack="decoder", expert=3, pooled=True).fetchall()
    assert [*found["direct_attribution"].values()] == pytest.approx([attributed[i] for i in (5, 6, 9, 7, 8)])


def test_the_card_is_a_page_of_its_own(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "card.html"
    done = collector("profile", str(folder), "--layer", "1", "--expert", "3", "--resamples", "20", "--html", str(out))
    assert json.loads(done.stdout)["expert"] == 3
    text = out.read_text(encoding="utf-8")
    assert "Expert 3 in decoder layer 1 of synthetic" in text
    assert "Promotes the tokens" in text
    assert "<button" not in text
    assert not re.search(r"(src|href)=|https?://", text)


def test_what_was_not_recorded_is_null(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path / "run", LAYERS, [shard()], record=(), weights=None))
    run.info["model"]["id"] = "synthetic"
    found = profile(run, layer=1, expert=0, resamples=20)
    assert [found[name] for name in ("contribution", "promotes", "direct_attribution")] == [None] * 3
    assert [found[name] for name in ("nearest_by_output", "nearest_by_weight")] == [None] * 2
    assert found["labels"]
    alone = random_shard(np.random.default_rng(1), LAYERS, [("en", 5), ("en", 7)])
    single = open_run(write_run(tmp_path / "single", LAYERS, [alone]))
    single.info["model"]["id"] = "synthetic"
    (label,) = profile(single, layer=1, expert=0, resamples=20)["labels"]
    assert (label["label"], label["q"], label["significant"]) == ("en", None, None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layer": 1, "expert": 6}, "--expert 6: layer 1 has experts 0 to 5"),
        ({"layer": 2, "expert": 0}, "layer 2 has several routers: say --stack, one of decoder, encoder"),
        ({"layer": 7, "expert": 0}, "layer 7 is not recorded"),
    ],
)
def test_an_expert_that_is_not_there_is_named(folder: Path, given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        profile(open_run(folder), **given)
