"""Prompts and their answers: definitions, and what the other answers are for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.query.warehouse import open_run
from collector.store.tables import Layer
from tests.helpers.query_runs import assert_same, few_examples, keyed, opened, random_runs
from tests.helpers.reference.base import decisions
from tests.helpers.reference.generation import phase_divergence
from tests.helpers.synthetic import Shard, write_run

LAYERS = (Layer(layer=2, n_experts=16, top_k=2),)


@few_examples
@given(random=random_runs(), include_special=st.booleans(), others=st.integers(1, 4))
def test_agrees_with_numpy_on_random_runs(random, include_special, others) -> None:
    layers, shards = random
    decided = decisions(layers, shards, include_special=include_special)
    params = {"include_special": include_special, "others": others}
    with opened(layers, shards) as run:
        expected = phase_divergence(decided, shards, others, pooled=False)
        assert_same(keyed(run, "phase_divergence", 4, **params), expected, rel=1e-6)
        pooled = {row[:4]: row[4:] for row in run.query("phase_divergence", pooled=True, **params).fetchall()}
        assert_same(pooled, phase_divergence(decided, shards, others, pooled=True), rel=1e-6)


@pytest.mark.parametrize("is_told", [True, False])
def test_answers_are_nearer_to_their_own_prompts_where_prompts_tell_about_them(tmp_path: Path, is_told) -> None:
    """60 documents of 40 tokens, half of them written; each document has a taste, or prompts and answers their own."""
    rng = np.random.default_rng(1)
    tastes = rng.standard_gamma(0.3, (60, 16)) + 0.01, rng.standard_gamma(0.3, (60, 16)) + 0.01
    p = np.concatenate([
        rng.standard_gamma(np.repeat(tastes[phase if not is_told else 0][[doc]], 20, axis=0))
        for doc in range(60) for phase in (0, 1)
    ]) + 1e-9  # fmt: skip
    shard = Shard.of_probabilities(LAYERS, documents=[("en", 40)] * 60, probabilities={2: p / p.sum(1, keepdims=True)})
    run = open_run(write_run(tmp_path / "run", LAYERS, [shard]))
    found = {metric: numbers for metric, *numbers in run.query("phase_divergence").project(
        "metric, value, baseline, standard_error").fetchall()}  # fmt: skip
    for metric, sign in (("answer_divergence", -1), ("own_answer_nearer", 1)):
        value, baseline, error = found[metric]
        assert (sign * (value - baseline) > 4 * error) == is_told
        assert is_told or abs(value - baseline) < 3 * error


def test_documents_without_an_answer_are_left_out(tmp_path: Path) -> None:
    shard = Shard.of_picks(LAYERS, documents=[("en", 2), ("en", 1), ("en", 2)], experts={2: [[0, 1]] * 5})
    shard = dataclasses.replace(shard, prompt_tokens=np.array([1, 1, 2]))
    rows = open_run(write_run(tmp_path / "run", LAYERS, [shard])).query("phase_divergence").fetchall()
    assert rows == [("answer_divergence", "decoder", 2, "en", 0.0, None, None, 1)]
