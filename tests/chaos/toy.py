"""A checkpoint and a file of documents whose routing numpy can work out.

The checkpoint is a real OLMoE, only small and with crafted weights: the output projection of every attention and
of every expert is zero, so the residual stream stays the token's embedding, and what a router answers depends on
the token id and the layer alone. The tokenizer knows bytes: an id is the byte's value plus three, after a
`<bos>` of its own. Both are written as any checkpoint is and loaded as any checkpoint is.

The expected answers are the business of `oracle`, which never runs the model.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np

PAD, EOS, BOS, FIRST_BYTE = 0, 1, 2, 3
LAYERS, EXPERTS, TOP_K, HIDDEN = 3, 6, 2, 16
MAX_LENGTH = 48
"""Some documents are longer, in bytes, and get cut."""
LEAST_GAP = 1e-3
"""Between any two logits that decide which expert comes first, or at all: far beyond float32's rounding."""
SCRIPTS = {"eng_Latn": (0x61, 26), "bul_Cyrl": (0x430, 32), "kor_Hang": (0xAC00, 600), "tha_Thai": (0xE01, 46)}
BAD_ROWS = ('{"text": "cut off', '{"text": "   ", "label": "eng_Latn"}', '{"text": "no label"}')
"""Not JSON, an empty text, no label."""


def write_model(folder: Path, seed: int = 0, broken_byte: int | None = None) -> Path:
    """Writes checkpoint and tokenizer; the seed decides every weight, and a broken byte's embedding is NaN."""
    import torch
    from transformers import OlmoeConfig, OlmoeModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = OlmoeConfig(
        vocab_size=FIRST_BYTE + 256, hidden_size=HIDDEN, intermediate_size=8, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=2, num_experts=EXPERTS, num_experts_per_tok=TOP_K,
        max_position_embeddings=512, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
        norm_topk_prob=bool(seed % 2),
    )  # fmt: skip
    model = OlmoeModel(config)
    state = {name: torch.from_numpy(values) for name, values in _weights(seed).items()}
    if broken_byte is not None:
        state["embed_tokens.weight"][FIRST_BYTE + broken_byte] = torch.nan
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "experts.down_proj")):
            state[name] = torch.zeros_like(parameter)
    unknown = set(state) - set(model.state_dict())
    assert not unknown, f"transformers calls its parameters otherwise now: {unknown}"
    model.load_state_dict(state, strict=False)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _weights(seed: int) -> dict[str, np.ndarray]:
    """Embedding, norms and routers; drawn again until no decision is a near tie."""
    from tests.chaos.oracle import logits_of

    for attempt in range(1000):
        rng = np.random.default_rng([seed, attempt])
        weights = {"embed_tokens.weight": rng.normal(size=(FIRST_BYTE + 256, HIDDEN)).astype(np.float32)}
        for layer in range(LAYERS):
            norm = rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32)
            weights[f"layers.{layer}.post_attention_layernorm.weight"] = norm
            gate = (rng.normal(size=(EXPERTS, HIDDEN)) / HIDDEN**0.5).astype(np.float32)
            weights[f"layers.{layer}.mlp.gate.weight"] = gate
        best = np.sort(np.stack([logits_of(weights, layer) for layer in range(LAYERS)]), axis=-1)[..., -TOP_K - 1 :]
        if np.diff(best, axis=-1).min() > LEAST_GAP:
            return weights
    raise AssertionError("no weights without near ties")


def _tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    specials = {"<pad>": PAD, "<eos>": EOS, "<bos>": BOS}
    characters = {character: FIRST_BYTE + byte for byte, character in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=specials | characters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=512
    )


def write_documents(path: Path, count: int, seed: int = 0) -> Path:
    """A JSONL file of short texts in four scripts, some cut at `MAX_LENGTH`; every 17th row is no document."""
    rng = random.Random(seed)
    lines = []
    for row in range(count):
        if row % 17 == 11:
            lines.append(BAD_ROWS[row // 17 % len(BAD_ROWS)])
            continue
        label = rng.choice(sorted(SCRIPTS))
        first, size = SCRIPTS[label]
        letters = [chr(first + rng.randrange(size)) for _ in range(rng.randint(3, 24))]
        text = "".join(" " if rng.random() < 0.15 else letter for letter in letters)
        lines.append(json.dumps({"text": "." + text, "label": label, "id": f"id-{row}"}, ensure_ascii=row % 2 == 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path
