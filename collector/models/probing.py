"""Runs a model once over two tokens, so that hooks can learn what its modules return."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def tiny_pass(model: PreTrainedModel) -> Any:
    """Returns what a base model returns for two tokens; an encoder–decoder model decodes the same two."""
    ids = torch.tensor([[0, 1]], device=model.device)
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, use_cache=False, **inputs)
