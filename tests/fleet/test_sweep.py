"""Sweeps over checkpoints: the same documents for all, in any number of launches, from a folder or the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from collector.config import CaptureConfig, DataConfig, LaunchConfig, ModelConfig
from collector.data.plan import Plan
from collector.fleet import driver
from collector.fleet.sweep import Choice, collect
from collector.look import terminal_sweep
from collector.models import downloads
from collector.store.run_directory import PLAN, RUN, SUCCESS, RunDirectory
from collector.store.sweep_directory import SweepDirectory
from tests.helpers.hub import local_hub
from tests.helpers.runs import collect_here, content, run_config, write_jsonl
from tests.helpers.sweeps import break_weights, sweep_here, sweeping, write_checkpoints

NAMES = ("step2-tokens1M", "step10-tokens5M", "step40-tokens20M")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder of three checkpoints."""
    return write_checkpoints(tmp_path_factory.mktemp("trained"), NAMES)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("texts") / "texts.jsonl", 12)


def attempts(sweep: SweepDirectory) -> dict[str, list[str]]:
    """Checkpoint -> the attempts that were committed, which tell one collection from another."""
    return {each.name: [commit.attempt for commit in sweep.run(each).commits()] for each in sweep.checkpoints()}


def test_every_checkpoint_gets_an_ordinary_run_of_the_same_shards(tmp_path, trained, texts):
    said: list[str] = []
    sweep = sweep_here(tmp_path / "sweep", trained, texts, said)
    assert [(each.name, each.step, each.tokens_seen) for each in sweep.checkpoints()] == [
        ("step2-tokens1M", 2, 10**6), ("step10-tokens5M", 10, 5 * 10**6), ("step40-tokens20M", 40, 20 * 10**6),
    ]  # fmt: skip
    assert [line for line in said if line.startswith("checkpoint")] == [
        f"checkpoint {number} of 3: {name}" for number, name in enumerate(NAMES, 1)
    ]
    plans = [Plan.from_parquet(sweep.run(each).store.read(PLAN)) for each in sweep.checkpoints()]
    assert plans[0].shards == plans[1].shards == plans[2].shards
    assert len({plan.hash for plan in plans}) == 3, "the model is part of a run's settings"
    fingerprints = {sweep.run(each).read_json(RUN)["model"]["fingerprint"] for each in sweep.checkpoints()}
    assert len(fingerprints) == 3
    alone = run_config(DataConfig(data=(str(texts),), docs_per_shard=8), ModelConfig(model=str(trained / NAMES[1])))
    by_itself = collect_here(tmp_path / "alone", alone, threads=1)
    assert by_itself.read_json(RUN)["plan_hash"] == plans[1].hash
    assert content(by_itself)["routing"].equals(content(sweep.run(sweep.checkpoints()[1]))["routing"])


def test_the_same_command_goes_on_where_it_was_interrupted(tmp_path, trained, texts):
    begun = []

    def interrupted_at_the_second(at, config, part_of):
        begun.append(at)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return driver.collect_in_process(at, config, part_of=part_of, threads=1)

    with pytest.raises(KeyboardInterrupt):
        sweeping(tmp_path / "sweep", trained, texts, collect_one=interrupted_at_the_second).run()
    sweep = SweepDirectory(tmp_path / "sweep")
    first = attempts(sweep)
    assert [len(each) for each in first.values()] == [2, 0, 0]
    said: list[str] = []
    sweep_here(tmp_path / "sweep", trained, texts, said)
    assert "1 of them are complete" in said
    done = attempts(sweep)
    assert [len(each) for each in done.values()] == [2, 2, 2]
    assert done[NAMES[0]] == first[NAMES[0]]

    def never(*_):
        raise AssertionError("a complete run is collected again")

    sweeping(tmp_path / "sweep", trained, texts, collect_one=never).run()
    assert attempts(sweep) == done


def test_checkpoints_may_be_added_and_other_settings_are_refused(tmp_path, trained, texts):
    sweep = sweep_here(tmp_path / "sweep", trained, texts, revisions=["step2-*", "step40-*"])
    before = attempts(sweep)
    with pytest.raises(ValueError, match="has no checkpoint 'step11'"):
        sweep_here(tmp_path / "sweep", trained, texts, revisions=["step11"])
    with pytest.raises(ValueError, match="a sweep with other settings:\n  --limit was not given, is now 5\nGo on with"):
        sweep_here(tmp_path / "sweep", trained, texts, limit=5)
    sweep_here(tmp_path / "sweep", trained, texts, revisions=["step10-*"])
    after = attempts(sweep)
    assert list(after) == list(NAMES), "in the order of training"
    assert before.items() < after.items()


def test_documents_that_changed_are_refused_before_the_next_checkpoint(tmp_path, trained, texts):
    own = Path(shutil.copy(texts, tmp_path / "texts.jsonl"))
    sweep_here(tmp_path / "sweep", trained, own, revisions=[NAMES[0]])
    own.write_text(own.read_text() + '{"text": "one more", "label": "en"}\n')
    with pytest.raises(ValueError, match=r"no longer those that it began with: .*texts.jsonl has changed"):
        sweep_here(tmp_path / "sweep", trained, own)
    assert not (tmp_path / "sweep" / NAMES[1]).exists()


def test_different_tokenizers_are_refused_before_anything_is_collected(tmp_path, trained, texts):
    own = shutil.copytree(trained, tmp_path / "trained")
    file = own / NAMES[2] / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["merges"].pop()  # the same entries, but other tokens
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=f"the tokenizers of {NAMES[0]} and {NAMES[2]} differ"):
        sweep_here(tmp_path / "sweep", own, texts)
    assert not (tmp_path / "sweep" / NAMES[0]).exists()
    tokenizer["padding"] = None
    tokenizer["truncation"] = {"direction": "Right", "max_length": 7, "strategy": "LongestFirst", "stride": 0}
    prints = []
    for name in NAMES[:2]:
        (own / name / "tokenizer.json").write_text(json.dumps(tokenizer | ({} if prints else {"truncation": None})))
        prints.append(downloads.tokenizer_fingerprint(ModelConfig(model=str(own / name))))
    assert prints[0] == prints[1], "the collector cuts texts itself"


def test_a_broken_checkpoint_costs_the_others_nothing_and_is_tried_again(tmp_path, trained, texts, capsys):
    own = shutil.copytree(trained, tmp_path / "trained")
    weights = break_weights(own / NAMES[1])
    said: list[str] = []
    launch = sweeping(tmp_path / "sweep", own, texts, said)
    sweep = launch.run()
    assert [sweep.is_complete(each) for each in sweep.checkpoints()] == [True, False, True]
    assert [line.partition(": ")[0] for line in launch.failed] == [NAMES[1]]
    assert f"not collected: {launch.failed[0]}" in said
    assert not terminal_sweep.status(sweep)
    out = capsys.readouterr().out
    assert "2 of 3 checkpoints are complete, 12 documents planned for each" in out
    assert f"{NAMES[1]} failed: " in out
    assert "has no weights" in out
    (own / NAMES[1] / "model.safetensors").write_bytes(weights)
    sweep_here(tmp_path / "sweep", own, texts)
    assert terminal_sweep.status(sweep)
    assert "failed" not in capsys.readouterr().out


def test_settings_that_fail_everywhere_end_the_sweep_at_the_second_checkpoint(tmp_path, trained, texts):
    tried = []

    def refuses(at, *_):
        tried.append(at)
        raise ValueError("layer 9 has no router")

    with pytest.raises(ValueError, match=f"no checkpoint could be collected: {NAMES[0]}: layer 9 has no router; "):
        sweeping(tmp_path / "sweep", trained, texts, collect_one=refuses).run()
    assert len(tried) == 2


def test_rejected_rows_end_the_sweep_in_every_launch(tmp_path, trained):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "fine", "label": "en"}\n' + '{"text": "no label"}\n' * 3)
    for _ in range(2):
        with pytest.raises(ValueError, match="3 of 4 rows were rejected, more than --max-rejected"):
            sweeping(tmp_path / "sweep", trained, texts, max_rejected=0.5).run()
    assert not (tmp_path / "sweep" / NAMES[1]).exists()


@pytest.mark.parametrize(
    ("model", "choice", "why"),
    [
        (ModelConfig(model="me/moe", revision="step1"), Choice(), "a sweep takes --revisions"),
        (ModelConfig(model="me/moe", weights="random"), Choice(), "the same at every checkpoint"),
        (ModelConfig(model="me/moe"), Choice(every=0), "--every must be positive"),
        (ModelConfig(model="."), Choice(delete_after_use=True), "--model . is a folder"),
    ],
)
def test_settings_without_sense_are_refused_before_ray_starts(tmp_path, model, choice, why):
    with pytest.raises(ValueError, match=why):
        collect(str(tmp_path), choice=choice, data=DataConfig(), model=model, capture=CaptureConfig(),
                launch=LaunchConfig())  # fmt: skip


def test_a_run_is_no_place_for_a_sweep_nor_a_sweep_for_a_run(tmp_path, trained, texts):
    sweep_here(tmp_path / "sweep", trained, texts, revisions=[NAMES[0]])
    with pytest.raises(ValueError, match="holds a run, which is no place for a sweep"):
        sweep_here(tmp_path / "sweep" / NAMES[0], trained, texts)
    config = run_config(DataConfig(data=(str(texts),)), ModelConfig(model=str(trained / NAMES[0])))
    with pytest.raises(ValueError, match="holds a sweep, which is no place for a run"):
        driver.freeze_plan(RunDirectory(tmp_path / "sweep"), config)


# ---- from the hub ----


def weights_sent(hub) -> list[str]:
    return [branch for branch, name in hub.sent if name.endswith(".safetensors")]


def test_checkpoints_of_the_hub_are_downloaded_ahead_once_and_deleted_after_use(tmp_path, trained, texts):
    repository = {name: trained / name for name in NAMES} | {"main": trained / NAMES[0]}
    cache = tmp_path / "cache"
    with local_hub({"me/moe": repository}, cache) as hub:
        mine = ModelConfig(model="me/moe", revision=NAMES[1])
        downloads.fetch(mine)  # somebody needed this one before
        said: list[str] = []
        sweep = sweep_here(tmp_path / "sweep", "me/moe", texts, said, delete_after_use=True)
        assert all(map(sweep.is_complete, sweep.checkpoints()))
        assert sweep.run(sweep.checkpoints()[2]).read_json(RUN)["model"]["revision"] == hub.commit(NAMES[2])
        assert weights_sent(hub) == [NAMES[1], NAMES[0], NAMES[2]], "each once"
        left = {branch for branch in NAMES if downloads.cached_weights("me/moe", revision=branch)}
        assert left == {NAMES[1]}, "what the sweep did not download it does not delete"
        assert [line.partition(":")[0] for line in said if "deleted" in line] == [NAMES[0], NAMES[2]]


def test_the_next_checkpoint_is_downloaded_while_one_is_in_use(tmp_path, trained):
    with local_hub({"me/moe": {name: trained / name for name in NAMES}}, tmp_path / "cache") as hub:
        loader = downloads.Downloads([ModelConfig(model="me/moe", revision=name) for name in NAMES], [].append)
        loader.wait()
        loader._thread.join()  # while the first is in use
        assert weights_sent(hub) == list(NAMES[:2]), "one ahead, not more"
        loader.wait()
        loader.wait()
        assert weights_sent(hub) == list(NAMES)
        missing = downloads.Downloads([ModelConfig(model="me/moe", revision="step9")], [].append)
        with pytest.raises(ValueError, match="check --revision"):
            missing.wait()


def test_a_sweep_goes_on_without_the_hub_with_what_the_cache_has(tmp_path, trained, texts):
    with local_hub({"me/moe": {name: trained / name for name in NAMES[:2]}}, tmp_path / "cache") as hub:
        with hub.unreachable(), pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
            sweep_here(tmp_path / "sweep", "me/moe", texts)
        sweep = sweep_here(tmp_path / "sweep", "me/moe", texts)
        (tmp_path / "sweep" / NAMES[1] / SUCCESS).unlink()
        said: list[str] = []
        with hub.unreachable():
            sweeping(tmp_path / "sweep", "me/moe", texts, said, collect_one=finish_only).run()
        assert all(map(sweep.is_complete, sweep.checkpoints()))
        assert any(line.startswith("going on with the 2 checkpoints that the sweep has") for line in said)


def finish_only(at, config, part_of):
    """Marks a run complete whose shards all are committed."""
    run = RunDirectory(at)
    driver.finish(run, driver.freeze_plan(run, config, part_of=part_of))
    return run
