"""One text before and after edits of its routing: what is told is what transformers computes."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from collector.config import CaptureConfig, ModelConfig
from collector.look.trace import intervening
from collector.models.edits import Edit
from collector.models.loading import DEMO_MODEL
from tests.helpers.command_line import collector

TEXT = "The cat sat on the mat"
DEMO = ModelConfig(dtype="float32")


def compared(edits, positions=None, model=DEMO, **capture):
    return intervening.compare(TEXT, model, CaptureConfig(**capture), "cpu", edits, positions)


def dropped_by_hand(edit: Edit) -> torch.Tensor:
    """The next token's probabilities of transformers' own model, whose expert puts out nothing."""
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype="float32").eval()
    ids = AutoTokenizer.from_pretrained(DEMO_MODEL)(TEXT, return_tensors="pt").input_ids
    with torch.inference_mode():
        model.model.layers[edit.layer].mlp.experts.down_proj[edit.expert] = 0
        return model(ids).logits[0, -1].double().softmax(-1)


def test_what_comes_next_is_what_transformers_says_of_an_expert_without_output() -> None:
    plain = compared([Edit(layer=0, expert=0, operation="scale", value=1.0)], layers=(4,))
    expert = plain.before.routers[0].decisions[-1].expert
    edit = Edit(layer=4, expert=expert, operation="drop")
    outcome = compared([edit], layers=(4, 5))
    after = dropped_by_hand(edit)
    assert [each.after for each in outcome.first_after] == pytest.approx(after.topk(10).values.tolist(), rel=1e-4)
    assert sum(each.before for each in outcome.first_before) > 0.1
    assert outcome.divergence > 1e-5
    dropped = outcome.after.routers[0].decisions[-1]
    assert dropped.weights[dropped.experts.index(expert)] == 0
    assert outcome.changes.startswith("Tokens with other experts: layer 4 0 of ")


def test_an_edit_that_changes_nothing_changes_nothing() -> None:
    outcome = compared([Edit(layer=4, expert=3, operation="bias", value=0.0)], layers=(4,))
    assert outcome.divergence == 0
    assert outcome.before == outcome.after
    assert outcome.first_before == outcome.first_after


def test_an_edit_of_one_position_leaves_those_before_it() -> None:
    outcome = compared([Edit(layer=4, expert=31, operation="force")], [3])
    at = [router.layer for router in outcome.before.routers].index(4)
    for position in range(len(outcome.before.routers[0].tokens)):
        old, new = (trace.routers[at].decisions[position] for trace in (outcome.before, outcome.after))
        assert (31 in new.experts) == (31 in old.experts or position == 3)
        if position < 3:
            assert old == new


def test_the_command_prints_both_and_writes_the_page(tmp_path) -> None:
    out = tmp_path / "page.html"
    done = collector("trace", TEXT, "--layers", "4", "--edit", "layer=4 expert=31 operation=force", "layer=5 expert=2 "
                     "operation=scale value=3", "--position", "2", "--html", str(out))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "With layer=4 expert=31 operation=force; layer=5 expert=2 operation=scale value=3 at 2" in done.stdout
    assert re.search(r"Tokens with other experts: layer 4 1 of \d+", done.stdout)
    assert "Most probable next tokens" in done.stdout
    assert re.search(r"KL\(as it is ‖ with the edits\) = \d+\.\d{4} nats", done.stdout)
    text = out.read_text(encoding="utf-8")
    assert "Most probable next tokens" in text
    assert text.count("<h1>") == 3
    assert not re.search(r"(src|href)=|https?://", text)


def test_a_model_without_a_head_shows_its_routing(tiny_folder) -> None:
    outcome = compared([Edit(layer=1, expert=2, operation="drop")], model=ModelConfig(model=str(tiny_folder)))
    assert outcome.divergence is None
    assert "it was saved without its head" in outcome.silence
    assert outcome.after.routers


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("layer=1 expert=9", "lacks operation"),
        ("layer=one expert=9 operation=drop", "layer takes a whole number, got 'one'"),
        ("layer=1 expert=9 operation=drop weight=2", "'weight' is none of layer=…, expert=…"),
        ("layer=1 expert=9 operation=swap", "it is one of drop, drop_renorm"),
        ("layer=1 expert=9 operation=scale", "scale needs a value"),
        ("layer=1 expert=99 operation=drop", "layer 1 has experts 0 to 63, not 99"),
        ("layer=31 expert=9 operation=drop", "no router in decoder layer 31; the model has decoder 0, decoder 1"),
    ],
)
def test_an_edit_that_cannot_be_is_refused_in_one_line(edit: str, message: str) -> None:
    done = collector("trace", TEXT, "--edit", edit)
    assert done.returncode != 0
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_position_beyond_the_text_and_one_without_an_edit_are_refused() -> None:
    done = collector("trace", TEXT, "--edit", "layer=1 expert=9 operation=drop", "--position", "99")
    assert "--position 99: the text has tokens 0 to " in done.stderr
    assert "there is no --edit" in collector("trace", TEXT, "--position", "1").stderr
