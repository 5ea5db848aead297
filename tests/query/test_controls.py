"""Controls of interventions: random sets of other experts that match the arm."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from collector.models.edits import Arm, parse
from collector.query.controls import classes_of, draw_controls
from collector.query.warehouse import open_run
from collector.store.tables import Layer
from tests.helpers.synthetic import Shard, write_run

LAYERS = (Layer(layer=0, n_experts=60, top_k=1), Layer(layer=1, n_experts=60, top_k=1))


def picks(order: list[int]) -> list[int]:
    """Picks the first expert once, the second twice, and so on."""
    return np.repeat(order, np.arange(1, len(order) + 1)).tolist()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Layer 0 picks expert 59 most often, layer 1 expert 0: tenths are six neighbours each."""
    experts = {0: picks([*range(60)]), 1: picks([*range(60)][::-1])}
    shard = Shard.of_picks(LAYERS, documents=[("en", 1830)], experts=experts)
    folder = tmp_path_factory.mktemp("controls") / "run"
    return open_run(write_run(folder, LAYERS, [shard], record=()))


def arm(*edits: str, name: str = "x") -> Arm:
    return Arm(name=name, edits=tuple(map(parse, edits)))


def rank(edit) -> int:
    return edit.expert if edit.layer == 0 else 59 - edit.expert


def test_controls_are_experts_of_the_same_tenth(run) -> None:
    own = arm("layer=0 expert=13 operation=scale value=2")
    drawn, said = draw_controls(run, [own], 5, seed=0)
    assert drawn[0] == own
    assert [(each.name, each.control) for each in drawn[1:]] == [("x", number) for number in range(1, 6)]
    assert {each.edits[0].expert for each in drawn[1:]} == {12, 14, 15, 16, 17}
    assert {each.edits[0].value for each in drawn} == {2}
    assert said == ["they share 0 % of their experts with their arm, as random sets do"]


def test_a_set_may_share_an_expert_with_its_arm(run) -> None:
    own = arm("layer=0 expert=13 operation=drop", "layer=1 expert=3 operation=drop")
    drawn, said = draw_controls(run, [own], 35, seed=0)
    assert len({each.edits for each in drawn}) == 36, "all 6 x 6 pairs"
    assert all(rank(one) // 6 == rank(other) // 6 for each in drawn for one, other in
               zip(each.edits, own.edits, strict=True))  # fmt: skip
    assert said == ["they share 14 % of their experts with their arm, as random sets do"], "10 of 70"


def test_larger_classes_help_where_the_closest_make_too_few(run) -> None:
    own = arm("layer=0 expert=13 operation=drop")
    drawn, said = draw_controls(run, [own], 11, seed=0)
    assert {each.edits[0].expert for each in drawn} == set(range(12, 24))
    assert said[1:] == ["1 of 1 arms are matched less closely, because closer classes make too few sets"]


def test_there_may_be_fewer_than_were_asked_for(run) -> None:
    drawn, said = draw_controls(run, [arm("layer=0 expert=59 operation=drop")], 99, seed=0)
    assert {each.edits[0].expert for each in drawn} == set(range(30, 60)), "half of the layer"
    assert said[-1] == "1 of 1 arms have 29 controls, because there are no more that match"


def test_an_arm_of_random_experts_is_one_more_draw(run) -> None:
    """Whichever set of its classes the arm is, the sets that may be drawn, with it, are the same."""
    everything = set()
    for expert, other in ((6, 12), (7, 17), (11, 14)):
        own = arm(f"layer=0 expert={expert} operation=drop", f"layer=0 expert={other} operation=drop")
        drawn, _ = draw_controls(run, [own], 35, seed=1)
        everything.add(frozenset(frozenset(edit.expert for edit in each.edits) for each in drawn))
    assert len(everything) == 1


@pytest.mark.parametrize(
    ("experts", "measures", "factor", "sizes"),
    [
        (64, 1, 1, {6, 7}), (8, 1, 1, {8}), (256, 1, 1, {25, 26}), (64, 2, 1, {8}), (128, 2, 1, {6, 7}),
        (256, 2, 1, {6, 7}), (64, 2, 4, {32}), (64, 1, 2, {12, 13}), (5, 2, 1, {5}),
    ],
)  # fmt: skip
def test_classes_are_equally_large_and_hold_six_experts_at_least(experts, measures, factor, sizes) -> None:
    rng = np.random.default_rng(0)
    values = rng.random((measures, experts))
    found = classes_of(values, factor)
    assert set(np.unique(found, return_counts=True)[1].tolist()) <= sizes
    firsts = [values[0, found == each] for each in range(found.max() + 1)]
    if measures == 1:
        assert all(low.max() < high.min() for low, high in itertools.pairwise(firsts))


def test_draws_depend_on_seed_and_name_alone(run) -> None:
    one, other = (arm("layer=0 expert=10 operation=drop", "layer=1 expert=9 operation=drop", name=n) for n in "ab")
    alone, _ = draw_controls(run, [one], 5, seed=0)
    together, _ = draw_controls(run, [other, one], 5, seed=0)
    assert together[6:] == alone
    assert draw_controls(run, [one], 5, seed=1)[0] != alone
    assert [each.edits for each in together[1:6]] != [each.edits for each in alone[1:]]


def test_experts_of_a_set_differ_and_edits_of_one_expert_stay_together(run) -> None:
    own = arm(
        "layer=0 expert=8 operation=drop", "layer=0 expert=9 operation=drop",
        "layer=0 expert=10 operation=bias value=1", "layer=0 expert=10 operation=scale value=2",
    )  # fmt: skip
    for each in draw_controls(run, [own], 10, seed=3)[0][1:]:
        first, second, third, fourth = (edit.expert for edit in each.edits)
        assert third == fourth
        assert len({first, second, third}) == 3


def test_layers_that_were_not_recorded_cannot_be_matched(run) -> None:
    with pytest.raises(ValueError, match="did not record decoder layer 5, which arm 'x' edits"):
        draw_controls(run, [arm("layer=5 expert=1 operation=drop")], 3, seed=0)


def test_a_set_without_any_other_has_no_control(run) -> None:
    everything = arm(*(f"layer=0 expert={expert} operation=drop" for expert in range(60)))
    with pytest.raises(ValueError, match="no other set of experts is chosen about as often as that of arm 'x'"):
        draw_controls(run, [everything], 3, seed=0)
