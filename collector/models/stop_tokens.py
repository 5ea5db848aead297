"""Finds the tokens that end a text that a model writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from collector.models import loading, locations

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from collector.config import ModelConfig


def stop_tokens(config: ModelConfig, loaded: loading.LoadedModel, texts: Sequence[str]) -> NDArray[np.int64]:
    """Returns the ids that end a text: the model's own, and all whose text contains one of `texts`.

    The model's own are those of its generation config, its config and its tokenizer together: instruction-tuned models
    as a rule name the token that ends a turn in the first only.

    Raises:
        ValueError: no token contains one of the texts.
    """
    found = {int(token) for token in _own(config, loaded)}
    pieces = loading.readable_vocabulary(loaded.tokenizer) if texts else []
    for text in texts:
        if not text:
            raise ValueError("--stop-at takes a text that ends the answer, got an empty one")
        with_text = [number for number, piece, _ in pieces if text in piece]
        if not with_text:
            raise ValueError(
                f"--stop-at {text!r}: no single token of the model contains it; name a shorter text, or the special "
                "token that ends an answer"
            )
        found.update(with_text)
    return np.array(sorted(found), np.int64)


def _own(config: ModelConfig, loaded: loading.LoadedModel) -> Iterator[int]:
    told = [loaded.tokenizer.eos_token_id, loaded.model.config.get_text_config().eos_token_id]
    for one in (*told, _generation_config(config)):
        yield from one if isinstance(one, list) else [] if one is None else [one]


def _generation_config(config: ModelConfig) -> Any:
    """The end tokens of the checkpoint's generation_config.json, which base models do not load."""
    from transformers import GenerationConfig

    location, revision = locations.resolve(config), config.revision or "main"
    try:
        found = GenerationConfig.from_pretrained(location, revision=revision, trust_remote_code=False)
    except OSError:  # few checkpoints have none
        return None
    return found.eos_token_id
