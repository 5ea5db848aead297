"""What a run holds of token ids: the ids, a secret permutation of them, or nothing."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from collector import token_ids
from collector.config import CaptureConfig, DataConfig, ModelConfig, resolve
from collector.data import plan
from collector.query.warehouse import list_queries
from collector.store.run_directory import VOCAB
from tests.helpers.query_runs import opened_once
from tests.helpers.runs import collect_here, content, run_config, write_jsonl

KEY = "correct horse battery staple"
NOT_RECORDED = {
    "loss", "weight_similarity", "expert_map", "direct_attribution", "output_specialization", "output_vocabulary",
    "expert_effect", "control_effects", "effect_specificity", "importance_agreement",
    "phase_divergence",
}  # fmt: skip
"""Queries of what these runs do not have."""


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv(token_ids.KEY_VARIABLE, KEY)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_folder, tiny_model):
    """Policy -> a run of the same documents."""
    folder = tmp_path_factory.mktemp("token-ids")
    data = DataConfig(data=(str(write_jsonl(folder / "texts.jsonl", 20)),), docs_per_shard=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(token_ids.KEY_VARIABLE, KEY)
        return {
            policy: collect_here(
                folder / policy,
                run_config(
                    data, ModelConfig(model=str(tiny_folder)), token_ids=policy, record=("outputs", "similarity")
                ),
                loaded=tiny_model,
            )
            for policy in ("keep", "hash", "drop")
        }


def ids(run) -> np.ndarray:
    return content(run)["tokens"]["token_id"].to_numpy()


# ---- the permutation ----


def test_a_permutation_has_every_id_once_and_depends_on_the_whole_key():
    one = token_ids.permutation(5000, KEY)
    assert sorted(one.tolist()) == list(range(5000))
    assert one.tolist() == token_ids.permutation(5000, KEY).tolist()
    for other in (KEY + "x", "x" + KEY, KEY * 10):
        changed = token_ids.permutation(5000, other)
        assert (changed == one).mean() < 0.01
        assert sorted(changed.tolist()) == list(range(5000))
    assert (one == np.arange(5000)).mean() < 0.01


def test_long_keys_count_to_their_last_character():
    long = "k" * 100
    assert token_ids.fingerprint(long + "a") != token_ids.fingerprint(long + "b")
    assert token_ids.permutation(100, long + "a").tolist() != token_ids.permutation(100, long + "b").tolist()


@pytest.mark.parametrize(("value", "found"), [(None, "it is not set"), ("too short", "it has 9")])
def test_hashing_needs_a_key_that_cannot_be_guessed(monkeypatch, value, found):
    monkeypatch.delenv(token_ids.KEY_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(token_ids.KEY_VARIABLE, value)
    with pytest.raises(ValueError, match=rf"16 characters .*{token_ids.KEY_VARIABLE}, and {found}"):
        config_with("hash")
    assert config_with("keep").token_key is config_with("drop").token_key is None


# ---- settings and the key ----


def config_with(policy):
    return resolve(data=DataConfig(), model=ModelConfig(), capture=CaptureConfig(token_ids=policy), device="cpu")


@pytest.mark.usefixtures("key")
def test_settings_show_a_fingerprint_of_the_key_and_never_the_key():
    config = config_with("hash")
    settings = config.to_dict()
    assert settings["token_ids"] == "hash"
    assert re.fullmatch("[0-9a-f]{16}", settings["token_key_fingerprint"])
    assert KEY not in str(settings)
    assert KEY not in repr(config)
    assert not {"token_key", "token_key_fingerprint"} & config_with("keep").to_dict().keys()


@pytest.mark.usefixtures("key")
def test_a_resume_with_another_key_differs_from_the_plan(monkeypatch):
    begun = config_with("hash").to_dict()
    assert plan.differences(begun, config_with("hash").to_dict()) == []
    monkeypatch.setenv(token_ids.KEY_VARIABLE, KEY.upper())
    (difference,) = plan.differences(begun, config_with("hash").to_dict())
    assert difference.startswith(f"--token-key-fingerprint was {begun['token_key_fingerprint']}, is now ")
    assert len(plan.differences(begun, config_with("drop").to_dict())) == 2


def test_no_file_of_a_run_holds_the_key(runs):
    files = [path for path in Path(runs["hash"].root).rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


# ---- runs ----


def test_hashed_ids_are_the_ids_under_the_permutation_of_the_key(runs):
    kept, hashed = ids(runs["keep"]), ids(runs["hash"])
    np.testing.assert_array_equal(token_ids.permutation(8192, KEY)[kept], hashed)
    assert (kept == hashed).mean() < 0.05
    assert len(set(kept)) == len(set(hashed)) == len(set(zip(kept, hashed, strict=True)))


def test_dropped_ids_are_null(runs):
    column = content(runs["drop"])["tokens"]["token_id"]
    assert column.null_count == len(column) == len(ids(runs["keep"]))


@pytest.mark.parametrize("policy", ["hash", "drop"])
def test_everything_but_the_ids_is_the_same(runs, policy):
    kept, other = content(runs["keep"]), content(runs[policy])
    for name in ("routing", "documents"):
        assert kept[name].to_pydict() == other[name].to_pydict()
    assert kept["tokens"].schema == other["tokens"].schema
    assert kept["tokens"].drop(["token_id"]).to_pydict() == other["tokens"].drop(["token_id"]).to_pydict()


def test_only_kept_ids_come_with_a_vocabulary(runs):
    """It would undo the permutation."""
    there = {policy: run.read_or_none(VOCAB) is not None for policy, run in runs.items()}
    assert there == {"keep": True, "hash": False, "drop": False}


WITHOUT_TOKENS = {"token_trace": "select * exclude (token_id, token) from shown",
                  "expert_tokens": "select * exclude (token_id, token) from shown",
                   "token_npmi": "select * exclude (token_id, token) from shown",
                   "expert_profile": "from shown where aspect not in ('token', 'context')",
                   "paths": "select metric, value, baseline, path from shown where metric !~ 'purity'"}  # fmt: skip
"""Of the queries that show tokens themselves, what says nothing about them."""
WITHOUT_IDS = ("token_trace", "expert_profile", "paths")
"""Those that have something left to say where there are no ids."""


def answers(run, name):
    """All cells of a query's rows, in order; those of lists one by one."""
    shown = opened_once(run.root).query(name)
    rows = (shown.query("shown", WITHOUT_TOKENS[name]) if name in WITHOUT_TOKENS else shown).fetchall()
    return [each for row in rows for cell in row for each in (cell if isinstance(cell, list) else [cell])]


@pytest.mark.parametrize(
    "query",
    [query for query in list_queries() if query.name not in NOT_RECORDED],
    ids=lambda query: query.name,
)
def test_queries_answer_the_same_of_permuted_ids_and_nothing_about_dropped_ones(runs, query):
    kept, hashed, dropped = (answers(run, query.name) for run in runs.values())
    # Approximately: DuckDB adds up in the order in which its threads come.
    assert hashed == pytest.approx(kept)
    about_tokens = re.search(r"token_id|token_counts\(", query.sql) and query.name not in WITHOUT_IDS
    assert dropped == ([] if about_tokens else pytest.approx(kept))
    assert kept or query.name in ("dropped_tokens", "routing_divergence"), "nothing was compared"
