"""Tiny models with random weights, and what they compute."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from collector.models.loading import DEMO_MODEL

SWITCH = {"vocab_size": 8192, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_heads": 4, "num_layers": 4,
          "num_sparse_encoder_layers": 2, "num_decoder_layers": 4, "num_sparse_decoder_layers": 2, "num_experts": 8,
          "expert_capacity": 3, "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1}  # fmt: skip


def write_switch(folder: Path) -> SwitchTransformersForConditionalGeneration:
    """Saves a Switch model with its head and the demo's tokenizer, and returns it; no token exceeds its capacity."""
    torch.manual_seed(0)
    model = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**SWITCH | {"expert_capacity": 64}))
    model.eval().save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(folder)
    return model


def outputs(model, rows=2, positions=7):
    ids = torch.randint(3, 60, (rows, positions), generator=torch.Generator().manual_seed(3))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.inference_mode():
        target = model.get_encoder() if model.config.is_encoder_decoder else model
        return target(**inputs, use_cache=False)[0] if target is model else target(**inputs)[0]
