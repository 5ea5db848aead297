"""Checkpoints of a training run: what their names tell, their order, and which of them a command takes."""

from __future__ import annotations

import pytest

from collector.config import ModelConfig
from collector.models.revisions import Checkpoint, find_checkpoints, of_checkpoint
from tests.helpers.hub import local_hub


@pytest.mark.parametrize(
    ("name", "step", "tokens"),
    [
        ("step1200000-tokens5033B", 1_200_000, 5_033 * 10**9),
        ("step5000-tokens20B", 5_000, 20 * 10**9),
        ("stage1-step10000-tokens42B", 10_000, 42 * 10**9),
        ("stage2-ingredient1-step1000-tokens3B", 1_000, 3 * 10**9),
        ("step00100-tokens0.4M", 100, 400_000),
        ("step0-tokens0K", 0, 0),
        ("checkpoint-500", 500, None),
        ("iter_0540", 540, None),
        ("global_step2000", 2_000, None),
        ("step143000", 143_000, None),
        ("ckpt_100", 100, None),
        ("step-50k-tokens-105B", 50_000, 105 * 10**9),
        ("3000", 3_000, None),
        ("STEP7-unsharded", 7, None),
        ("main", None, None),
        ("v1.0", None, None),
        ("epoch-3", None, None),
        ("footstep12", None, None),
        ("step12abc", None, None),
    ],
)
def test_step_and_tokens_are_read_from_the_name(name, step, tokens):
    checkpoint = Checkpoint(name=name)
    assert (checkpoint.step, checkpoint.tokens_seen) == (step, tokens)


def folder_of(tmp_path, *names: str) -> ModelConfig:
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    return ModelConfig(model=str(tmp_path))


def names(config: ModelConfig, *wanted: str, every: int = 1) -> list[str]:
    return [checkpoint.name for checkpoint in find_checkpoints(config, wanted, every)]


def test_the_order_is_that_of_training_by_stage_and_step_and_names_without_a_step_come_last(tmp_path):
    config = folder_of(tmp_path, "stage2-step10", "main", "stage1-step900", "epoch-10", "stage1-step1000", "epoch-9")
    assert names(config, "*") == ["stage1-step900", "stage1-step1000", "stage2-step10", "epoch-9", "epoch-10", "main"]


def test_by_default_all_are_taken_whose_names_tell_a_step(tmp_path):
    config = folder_of(tmp_path, "checkpoint-500", "checkpoint-1000", "best")
    (tmp_path / "step3").mkdir()  # without a config.json it is no checkpoint
    assert names(config) == ["checkpoint-500", "checkpoint-1000"]


@pytest.mark.parametrize(
    ("every", "taken"),
    [(1, [1, 2, 3, 4, 5, 6]), (2, [1, 3, 5, 6]), (5, [1, 6]), (4, [1, 5, 6]), (100, [1, 6])],
)
def test_every_nth_is_taken_and_always_the_last(tmp_path, every, taken):
    config = folder_of(tmp_path, *(f"step{number}" for number in range(1, 7)))
    assert names(config, every=every) == [f"step{number}" for number in taken]


def test_names_and_patterns_choose(tmp_path):
    config = folder_of(tmp_path, "step1", "step10", "step20", "final")
    assert names(config, "step1*") == ["step1", "step10"]
    assert names(config, "step20", "step1", "final") == ["step1", "step20", "final"]
    with pytest.raises(ValueError, match=r"no checkpoint 'step2'; did you mean step20\?"):
        names(config, "step2")
    with pytest.raises(ValueError, match=r"no checkpoint 'x\*'; it has step1, step10, step20, final"):
        names(config, "x*")


def test_what_is_no_series_of_checkpoints_says_what_it_has(tmp_path):
    with pytest.raises(ValueError, match="the demo model is a single checkpoint"):
        find_checkpoints(ModelConfig())
    with pytest.raises(ValueError, match=r"no checkpoint whose name tells a step; name some .*: it has best"):
        find_checkpoints(folder_of(tmp_path, "best"))


def test_a_checkpoint_is_a_folder_or_a_revision(tmp_path):
    config = folder_of(tmp_path, "step1")
    assert of_checkpoint(config, Checkpoint(name="step1")).model == str(tmp_path / "step1")
    of_hub = of_checkpoint(ModelConfig(model="me/moe", dtype="float32"), Checkpoint(name="step1"))
    assert (of_hub.model, of_hub.revision, of_hub.dtype) == ("me/moe", "step1", "float32")
    assert Checkpoint(name="runs/step1").folder == "runs--step1"


def test_branches_of_the_hub_come_with_their_commits(tmp_path):
    branches = dict.fromkeys(("main", "step20-tokens2B", "step3-tokens1B"), tmp_path)
    with local_hub({"me/moe": branches}, tmp_path / "cache") as hub:
        found = find_checkpoints(ModelConfig(model="me/moe"))
        assert [(each.name, each.commit) for each in found] == [
            (name, hub.commit(name)) for name in ("step3-tokens1B", "step20-tokens2B")
        ]
        with pytest.raises(ValueError, match="check the id; for a private repository set HF_TOKEN"):
            find_checkpoints(ModelConfig(model="me/nothing"))
        with hub.unreachable(), pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
            find_checkpoints(ModelConfig(model="me/moe"))
