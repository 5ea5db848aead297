"""Effects of interventions against numpy."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.query_runs import assert_same, few_examples, keyed, opened, random_runs
from tests.helpers.reference import interventions


@few_examples
@given(random=random_runs(), pooled=st.booleans())
def test_what_edits_do_agrees_with_numpy(random, pooled) -> None:
    layers, shards = random
    with opened(layers, shards) as run:
        assert_same(keyed(run, "expert_effect", 3, pooled=pooled), interventions.expert_effect(shards, pooled=pooled))


@few_examples
@given(random=random_runs(), of=st.sampled_from(interventions.METRICS), pooled=st.booleans())
def test_controls_one_by_one_agree_with_numpy(random, of, pooled) -> None:
    layers, shards = random
    with opened(layers, shards) as run:
        expected = interventions.control_effects(shards, of=of, pooled=pooled)
        assert_same(keyed(run, "control_effects", 4, of=of, pooled=pooled), expected)


@few_examples
@given(random=random_runs(), of=st.sampled_from(interventions.METRICS), split=st.booleans())
def test_specificity_agrees_with_numpy(random, of, split) -> None:
    layers, shards = random
    with opened(layers, shards) as run:
        expected = interventions.effect_specificity(shards, of=of, split=split)
        assert_same(keyed(run, "effect_specificity", 3, of=of, split=split), expected)


@few_examples
@given(random=random_runs(), share=st.sampled_from([0.25, 0.5]), pooled=st.booleans())
def test_agreement_with_importance_agrees_with_numpy(random, share, pooled) -> None:
    layers, shards = random
    with opened(layers, shards) as run:
        found = {row[:5]: row[5:] for row in run.query("importance_agreement", share=share, pooled=pooled).fetchall()}
        expected = interventions.importance_agreement(layers, shards, share=share, pooled=pooled)
        assert_same(found, expected, rel=1e-4)
