"""Texts that a model writes: against transformers' own generation, and the routing of the texts read as a whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from collector.capture.answers import _thoughts
from collector.capture.next_token import draw, random_numbers
from collector.config import ModelConfig
from collector.models import heads
from collector.models.loading import DEMO_MODEL
from tests.helpers.generating import assert_same_routing, write

PROMPTS = ("The capital of France is", "서울은", "Es war einmal ein", "I", "Привет, как")


@pytest.fixture(scope="module")
def head(demo_model):
    return heads.load_head(ModelConfig(), demo_model)


@pytest.fixture(scope="module")
def prompts(demo_model):
    return [demo_model.tokenizer(text).input_ids for text in PROMPTS]


def answers_of(table):
    spans = zip(table.starts[:-1], table.prompt_lengths, table.starts[1:], strict=True)
    return [table.ids[start + prompt : end].tolist() for start, prompt, end in spans]


@pytest.fixture(scope="module")
def by_transformers(prompts):
    """What `generate` of transformers writes, one prompt at a time."""
    model, whole = AutoModelForCausalLM.from_pretrained(DEMO_MODEL).eval(), []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        whole.append(found[0, len(prompt) :].tolist())
    return whole


def test_greedy_texts_are_those_that_transformers_writes_one_by_one(demo_model, head, prompts, by_transformers):
    table, written, whole = write(
        demo_model.model, prompts, head=head, generate=12, stop_ids=[1], tokens_per_batch=1024
    )
    assert answers_of(table) == by_transformers
    assert_same_routing(written, whole)


def test_a_text_ends_with_its_stop_token_or_with_the_last_token_allowed(demo_model, head, prompts, by_transformers):
    stop = by_transformers[0][4]
    table, written, whole = write(demo_model.model, prompts, head=head, generate=12, stop_ids=[stop])
    for answer, free, stopped in zip(answers_of(table), by_transformers, table.stopped, strict=True):
        assert answer == (free[: free.index(stop) + 1] if stop in free else free)
        assert stopped == (stop in free)
    assert len(answers_of(table)[0]) <= 5
    assert_same_routing(written, whole)


def test_draws_depend_on_document_and_seed_and_not_on_the_batch(demo_model, head, prompts):
    names = [f"document {number}" for number in range(len(prompts))]

    def drawn(order, **settings):
        table, *_ = write(
            demo_model.model, [prompts[d] for d in order], head=head, names=[names[d] for d in order], generate=8,
            **{"temperature": 1.5} | settings,
        )  # fmt: skip
        return dict(zip(order, answers_of(table), strict=True))

    together, alone = drawn([0, 1, 2, 3, 4], tokens_per_batch=1024), drawn([4, 2, 0, 3, 1], tokens_per_batch=1)
    assert together == alone
    assert drawn([0, 1, 2, 3, 4], seed=1) != together
    assert len({tuple(answer) for answer in together.values()}) == len(prompts)


def test_draws_have_the_probabilities_of_the_softmax_within_top_p():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0]).double()
    p = np.exp(logits.numpy() / 2) / np.exp(logits.numpy() / 2).sum()
    numbers = (torch.arange(20_000).double() + 0.5) / 20_000
    for top_p, kept in ((1.0, [0, 1, 2, 3, 4]), (0.6, [4, 0]), (1e-9, [4])):
        found = draw(logits.expand(20_000, -1), numbers, temperature=2.0, top_p=top_p).numpy()
        expected = np.where(np.isin(np.arange(5), kept), p, 0)
        np.testing.assert_allclose(np.bincount(found, minlength=5) / 20_000, expected / expected.sum(), atol=2e-4)


def test_the_largest_random_number_draws_a_token_that_may_be_drawn():
    logits = torch.tensor([[0.0, -50.0, 5.0]])
    assert draw(logits, torch.tensor([np.nextafter(1, 0)]), temperature=1.0, top_p=0.5).tolist() == [2]


def test_random_numbers_are_those_of_the_name_and_the_seed():
    numbers = random_numbers(["a", "b", "a"], 1000, seed=3)
    assert (numbers[0] == numbers[2]).all()
    assert not np.intersect1d(numbers[0], numbers[1]).size
    assert not np.intersect1d(numbers[0], random_numbers(["a"], 1000, seed=4)).size
    assert (numbers[0, :10] == random_numbers(["a"], 10, seed=3)).all()
    assert abs(numbers.mean() - 0.5) < 0.03


def test_nothing_is_written_after_no_token_at_all(demo_model, head, prompts):
    table, written, whole = write(demo_model.model, [[], prompts[0], []], head=head, generate=3)
    assert (table.lengths - table.prompt_lengths).tolist() == [0, 3, 0]
    assert table.stopped.tolist() == [False, False, False]
    assert_same_routing(written, whole)


def test_the_coldest_draw_is_the_most_probable_token():
    logits = torch.tensor([[0.0, 30.0, 29.0]])
    for settings in ({"temperature": 1e-40, "top_p": 1.0}, {"temperature": 1.0, "top_p": 1e-300}):
        assert draw(logits, torch.tensor([0.9]), **settings).tolist() == [1]


@pytest.mark.parametrize(
    ("prompt", "answer", "thought"),
    [
        ("- user\nHi\n", "<think>ab漢</think>ok", "ab漢"), ("- user\nHi\n", "<think>ab漢", "ab漢"),
        ("- assistant\n<think>\n", "so it is</think>yes", "so it is"), ("- assistant\n<think>\n", "</think>yes", ""),
        ("- user\nWhat does <think> mean?\n", "A tag.", ""),
        ("- user\nHi\n", "<think></think>x <think>y</think>z", "y"),
    ],
)  # fmt: skip
def test_the_tokens_of_a_thought_are_found(demo_model, prompt, answer, thought):
    tokenizer = demo_model.tokenizer
    ids = [*tokenizer(answer, add_special_tokens=False).input_ids]
    found = _thoughts(ids, prompt, tokenizer)
    inside = tokenizer.decode([token for token, is_thought in zip(ids, found, strict=True) if is_thought])
    assert inside.startswith(thought)
    assert len(inside) - len(thought) <= 2, "a token may end a thought and go on"
    assert found.any() == bool(thought)
