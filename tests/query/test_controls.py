"""Controls of interventions: random sets of other experts that match the arm."""

from __future__ import annotations

import numpy as np
import pytest

from collector.models.edits import Arm, parse
from collector.query.controls import draw_controls
from collector.query.warehouse import open_run
from collector.store.tables import Layer
from tests.helpers.synthetic import Shard, write_run

LAYERS = (Layer(layer=0, n_experts=20, top_k=1), Layer(layer=1, n_experts=20, top_k=1))


def picks(order: list[int]) -> list[int]:
    """The first expert is picked once, the second twice …: deciles are pairs of neighbours."""
    return np.repeat(order, np.arange(1, len(order) + 1)).tolist()


@pytest.fixture(scope="module", params=[(), ("outputs",)], ids=["routing", "outputs"])
def run(tmp_path_factory, request):
    """Layer 0 picks expert 19 most often, layer 1 expert 0; what an expert puts out is as large for all."""
    experts = {0: picks([*range(20)]), 1: picks([*range(20)][::-1])}
    shard = Shard.of_picks(LAYERS, documents=[("en", 210)], experts=experts)
    folder = tmp_path_factory.mktemp("controls") / "run"
    return open_run(write_run(folder, LAYERS, [shard], record=request.param))


def arm(*edits: str, name: str = "x") -> Arm:
    return Arm(name=name, edits=tuple(map(parse, edits)))


def rank(edit) -> int:
    return edit.expert if edit.layer == 0 else 19 - edit.expert


def test_controls_are_experts_of_the_same_tenth(run) -> None:
    own = arm("layer=0 expert=4 operation=drop")
    drawn, said = draw_controls(run, [own], 1, seed=0)
    assert drawn[0] == own
    (control,) = drawn[1:]
    assert (control.name, control.control, control.edits) == ("x", 1, (parse("layer=0 expert=5 operation=drop"),))
    assert said == []


def test_a_set_may_share_experts_with_its_arm(run) -> None:
    own = arm("layer=0 expert=4 operation=drop", "layer=1 expert=3 operation=scale value=2")
    drawn, said = draw_controls(run, [own], 3, seed=0)
    found = {tuple(edit.expert for edit in each.edits) for each in drawn[1:]}
    assert found == {(4, 2), (5, 3), (5, 2)}, "all but the arm itself"
    assert {each.edits[1].value for each in drawn} == {2}
    assert said == []


def test_fifths_and_thirds_help_where_tenths_make_too_few(run) -> None:
    own = arm("layer=0 expert=10 operation=drop", "layer=1 expert=9 operation=drop")
    drawn, said = draw_controls(run, [own], 14, seed=0)
    assert len({each.edits for each in drawn}) == 15, "all differ"
    for each in drawn[1:]:
        assert all(rank(one) // 4 == rank(other) // 4 for one, other in zip(each.edits, own.edits, strict=True))
    assert said == ["1 of 1 arms are matched by fifths or thirds of their layer, not tenths"]


def test_there_may_be_fewer_than_were_asked_for(run) -> None:
    drawn, said = draw_controls(run, [arm("layer=0 expert=19 operation=drop")], 99, seed=0)
    assert {each.edits[0].expert for each in drawn[1:]} == {18, 17, 16, 15, 14}, "the last third"
    assert said[-1] == "1 of 1 arms have 5 controls, because there are no more that match"


def test_an_arm_of_random_experts_is_one_more_draw(run) -> None:
    """Whichever set of its classes the arm is, the sets that may be drawn, with it, are the same."""
    everything = set()
    for expert, other in ((6, 10), (6, 11), (7, 10), (7, 11)):
        own = arm(f"layer=0 expert={expert} operation=drop", f"layer=0 expert={other} operation=drop")
        drawn, _ = draw_controls(run, [own], 3, seed=1)
        everything.add(frozenset(frozenset(edit.expert for edit in each.edits) for each in drawn))
    assert len(everything) == 1


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
    everything = arm(*(f"layer=0 expert={expert} operation=drop" for expert in range(20)))
    with pytest.raises(ValueError, match="no other set of experts is chosen about as often as that of arm 'x'"):
        draw_controls(run, [everything], 3, seed=0)
