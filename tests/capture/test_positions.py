"""Causal models get no padding mask, and are not asked for packed texts; all others get what they need."""

from __future__ import annotations

import pytest
import torch
from transformers import OlmoeModel, SwitchTransformersConfig, SwitchTransformersModel, masking_utils

from collector.capture.positions import looks_back_only, one_text_per_row
from collector.models.routers import find_routers
from tests.helpers.capturing import router_capture


def given_masks(model, mask):
    """The keyword arguments that the model gets for a batch with this mask."""
    found = {}
    handle = model.register_forward_pre_hook(lambda _m, _a, kwargs: found.update(kwargs), with_kwargs=True)
    with router_capture(model, find_routers(model)) as capture:
        capture.run(torch.full(mask.shape, 5), mask).wait()
    handle.remove()
    return found


RIGHT = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])


def test_padding_on_the_right_of_a_causal_model_needs_no_mask(tiny_model):
    assert looks_back_only(tiny_model.model)
    assert "attention_mask" not in given_masks(tiny_model.model, RIGHT)


def test_padding_on_the_left_needs_mask_and_positions(tiny_model):
    assert given_masks(tiny_model.model, RIGHT.flip(1)).keys() >= {"attention_mask", "position_ids"}


def test_a_model_that_looks_ahead_keeps_its_mask(tiny_model):
    config = type(tiny_model.model.config)(**tiny_model.model.config.to_dict() | {"is_causal": False})
    model = OlmoeModel(config).eval()
    assert not looks_back_only(model)
    assert "attention_mask" in given_masks(model, RIGHT)


def test_an_encoder_keeps_its_mask():
    model = SwitchTransformersModel(
        SwitchTransformersConfig(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_decoder_layers=2,
                                 num_heads=2, num_experts=4)
    )  # fmt: skip
    assert not looks_back_only(model)


def test_only_inside_the_context_is_nobody_asked_for_packed_texts():
    packed = torch.tensor([[0, 1, 2, 0, 1]])
    assert masking_utils.find_packed_sequence_indices(packed) is not None
    with one_text_per_row(), one_text_per_row():
        assert masking_utils.find_packed_sequence_indices(packed) is None
    assert masking_utils.find_packed_sequence_indices(packed) is not None
    with pytest.raises(RuntimeError), one_text_per_row():
        raise RuntimeError
    assert masking_utils.find_packed_sequence_indices(packed) is not None
