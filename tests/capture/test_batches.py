"""Tokenizing, packing and padding: every real token gets exactly one place."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.capture import batches

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def padded(lengths, documents):
    return max(lengths[d] for d in documents) * len(documents)


@given(lengths, st.integers(1, 200))
def test_every_document_is_in_exactly_one_batch_and_no_batch_exceeds_the_budget(lengths, budget):
    packed = batches.pack(lengths, budget)
    assert sorted(itertools.chain(*packed)) == list(range(len(lengths)))
    for documents in packed:
        assert len(documents) == 1 or padded(lengths, documents) <= budget


@given(st.lists(st.integers(1, 12), min_size=1, max_size=7), st.integers(12, 40))
def test_packing_costs_no_more_than_any_way_to_cut_the_sorted_documents(lengths, budget):
    def cost(cut):
        return sum(max(part) * len(part) + batches.BATCH_CHARGE * budget for part in cut)

    ordered = sorted(lengths, reverse=True)
    cuts = itertools.chain.from_iterable(itertools.combinations(range(1, len(ordered)), n) for n in range(len(ordered)))
    possible = [[ordered[a:b] for a, b in itertools.pairwise((0, *cut, len(ordered)))] for cut in cuts]
    fitting = [cut for cut in possible if all(max(part) * len(part) <= budget for part in cut)]
    packed = [[lengths[d] for d in documents] for documents in batches.pack(lengths, budget)]
    assert cost(packed) == pytest.approx(min(map(cost, fitting)))


pairs = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=6)


@given(pairs, st.integers(24, 80))
def test_two_stacks_are_packed_by_the_padded_tokens_of_both(pairs, budget):
    def size(part):
        return (max(a for a, _ in part) + max(b for _, b in part)) * len(part)

    def cost(cut):
        return sum(size(part) + batches.BATCH_CHARGE * budget for part in cut)

    ordered = sorted(pairs, key=sum, reverse=True)
    cuts = itertools.chain.from_iterable(itertools.combinations(range(1, len(ordered)), n) for n in range(len(ordered)))
    possible = [[ordered[a:b] for a, b in itertools.pairwise((0, *cut, len(ordered)))] for cut in cuts]
    fitting = [cut for cut in possible if all(size(part) <= budget for part in cut)]
    packed = [[pairs[d] for d in documents] for documents in batches.pack(np.array(pairs), budget)]
    assert sorted(itertools.chain(*packed)) == sorted(pairs)
    assert all(size(part) <= budget for part in packed)
    assert cost(packed) == pytest.approx(min(map(cost, fitting)))


def test_the_longest_documents_come_first():
    packed = batches.pack([3, 50, 7, 50, 1], 100)
    assert sorted(packed[0]) == [1, 3]


def test_sorting_pays_on_mixed_lengths():
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(3.5, 0.9, 512).astype(int) + 1
    packed = batches.pack(lengths, 4096)
    arrival = [range(i, min(i + 16, 512)) for i in range(0, 512, 16)]
    assert lengths.sum() / sum(padded(lengths, d) for d in packed) > 0.85
    assert lengths.sum() / sum(padded(lengths, d) for d in arrival) < 0.6


def table_of(lengths):
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.arange(starts[-1]) + 100
    special = np.zeros(len(ids), bool)
    return batches.TokenTable(ids=ids, is_special=special, starts=starts, truncated=np.zeros(len(lengths), bool))


@pytest.mark.parametrize("side", ["left", "right"])
@given(lengths=lengths)
def test_padding_keeps_every_token_and_its_slot(side, lengths):
    table = table_of(lengths)
    batch = batches.pad(table, np.arange(len(lengths)), pad_id=0, side=side)
    real = batch.attention_mask.astype(bool)
    assert real.sum(1).tolist() == lengths
    assert (batch.input_ids[~real] == 0).all()
    np.testing.assert_array_equal(batch.input_ids[real], table.ids[batch.slots])
    np.testing.assert_array_equal(batch.slots, np.arange(len(table.ids)))
    edge = batch.attention_mask[:, 0 if side == "right" else -1]
    assert edge.all(), "padding is on the other side"


def test_a_decoder_sees_the_start_token_and_all_tokens_but_the_last():
    shifted = batches.shift_right(table_of([2, 0, 3, 1]), start_id=7)
    assert shifted.ids.tolist() == [7, 100, 7, 102, 103, 7]
    assert shifted.is_special.tolist() == [True, False, True, False, False, True]
    assert shifted.lengths.tolist() == [2, 0, 3, 1]


def test_doc_and_position_follow_from_the_lengths():
    table = table_of([2, 0, 3])
    assert table.doc.tolist() == [0, 0, 2, 2, 2]
    assert table.position.tolist() == [0, 1, 0, 1, 2]


def test_tokenizing_equals_the_tokenizer_text_by_text(demo_model, mixed_texts):
    table = batches.tokenize(demo_model.tokenizer, mixed_texts, 512)
    for index, text in enumerate(mixed_texts):
        ids = table.ids[table.starts[index] : table.starts[index + 1]]
        assert ids.tolist() == demo_model.tokenizer(text)["input_ids"]
    assert table.is_special.sum() == len(mixed_texts), "one <|bos|> per document"
    assert not table.truncated.any()


def test_special_tokens_written_in_the_text_are_not_the_tokenizers_own(demo_model):
    table = batches.tokenize(demo_model.tokenizer, ["a <|bos|> b"], 512)
    assert table.is_special.tolist() == [True] + [False] * (len(table.ids) - 1)


def test_a_long_document_is_cut_and_counted(demo_model):
    table = batches.tokenize(demo_model.tokenizer, ["short", "long " * 200, "x"], 16)
    assert table.truncated.tolist() == [False, True, False]
    assert table.lengths[1] == 16


def test_no_documents_are_no_tokens(demo_model):
    table = batches.tokenize(demo_model.tokenizer, [], 16)
    assert len(table.ids) == 0
    assert table.starts.tolist() == [0]
    assert batches.pack(table.lengths, 100) == []


def test_token_ids_are_taken_as_they_are_beside_texts(demo_model):
    tokenizer = demo_model.tokenizer
    eos, given = tokenizer.eos_token_id, [300, 301, tokenizer.bos_token_id, 302]
    table = batches.tokenize(tokenizer, ["a text", "", ""], 4, ids=[(), [*given[:3], eos], [*given, eos]])
    documents = [table.ids[a:b].tolist() for a, b in zip(table.starts[:-1], table.starts[1:], strict=True)]
    assert documents == [tokenizer("a text").input_ids, [*given[:3], eos], given]
    assert table.is_special[table.starts[1] :].tolist() == [False, False, True, True, False, False, True, False]
    assert table.truncated.tolist() == [False, False, True]


def test_special_tokens_at_the_end_are_left_out_where_the_model_writes_on():
    special = np.array([1, 0, 1, 1, 1, 0, 1, 1], bool)
    table = batches.TokenTable(
        ids=np.arange(8), is_special=special, starts=np.array([0, 3, 5, 7, 8]), truncated=np.zeros(4, bool),
        span=np.arange(8) * 10,
    )  # fmt: skip
    left = batches.without_closing(table, [0, 1, 3])
    assert left.ids.tolist() == [0, 1, 3, 5, 6, 7], "a document keeps its first token, and others their end"
    assert left.starts.tolist() == [0, 2, 3, 5, 6]
    assert left.span.tolist() == [0, 10, 30, 50, 60, 70]
