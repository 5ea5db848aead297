"""Loads the language-model head of a loaded base model, and computes logits with it.

The head is the model's own code: its class with a head is built without the base model, and its forward pass is given
hidden states instead. So a family's scaling, biases and soft caps are applied as transformers applies them. Only the
tensors of the output embedding are loaded; a tied one is that of the base model.

Shapes: R tokens, H hidden size, V entries of the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from collector.models import loading

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from collector.config import ModelConfig


class _Hidden(tuple[torch.Tensor]):
    """What a base model returns, without all that heads do not need."""

    __slots__ = ()

    @property
    def last_hidden_state(self) -> torch.Tensor:
        """[1, R, H]."""
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


class _Given(nn.Module):
    """Stands for the base model, or its decoder: returns hidden states that were given to it."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_rh: torch.Tensor | None = None

    def forward(self, *_args: Any, **_options: Any) -> _Hidden:
        """Returns what was given as if it had been computed."""
        assert self.hidden_rh is not None
        return _Hidden((self.hidden_rh[None],))


_LOGITS = {"cpu": 1 << 21, "cuda": 1 << 26}
"""Logits that are held at once, by kind of device: 8 MB in float32, which caches hold, and 256 MB."""
_FEWEST_ROWS = 256
"""Fewer would read the matrix more often than they are worth."""


class Head:
    """A language-model head on the device of its base model."""

    def __init__(self, model: PreTrainedModel, given: _Given, matrix: torch.Tensor) -> None:
        self._model, self._given, self._dtype = model, given, matrix.dtype
        self.device = matrix.device
        self.vocabulary = int(matrix.shape[0])
        """V."""
        at_once = _LOGITS["cpu" if self.device.type == "cpu" else "cuda"]
        self.rows_at_once = max(_FEWEST_ROWS, at_once // self.vocabulary)
        """R for which the logits take a fixed part of the memory."""

    @torch.inference_mode()
    def logits(self, hidden_rh: torch.Tensor) -> torch.Tensor:
        """Returns the logits [R, V] of last hidden states [R, H], in the precision of the head."""
        self._given.hidden_rh = hidden_rh.to(self._dtype)
        ids = torch.zeros((1, len(hidden_rh)), dtype=torch.long, device=hidden_rh.device)
        model: Any = self._model
        given = {"decoder_input_ids": ids, "encoder_outputs": _Hidden((self._given.hidden_rh[None],))}
        try:
            outputs = model(use_cache=False, **(given if model.config.is_encoder_decoder else {"input_ids": ids}))
        finally:
            self._given.hidden_rh = None
        return outputs.logits[0]


def load_head(config: ModelConfig, loaded: loading.LoadedModel) -> Head:
    """Loads the head of a model's checkpoint; of random weights it is drawn from the same seed.

    Raises:
        ValueError: transformers has no class with a head for this model, or the checkpoint has none.
    """
    base = loaded.model
    tensors = loading.checkpoint_tensors(config) if config.weights == "pretrained" else None
    return build_head(base, tensors, config.model, dtype=loaded.compute_dtype, seed=config.seed)


def stored_head(config: ModelConfig, loaded: loading.LoadedModel) -> dict[str, torch.Tensor]:
    """Reads the tensors of a model's head from its checkpoint, by name and in the model's precision, to save a copy.

    A tied output embedding is not among them: it is the base model's.

    Raises:
        ValueError: see `load_head`.
    """
    _, _, embedding, path = _without_base(loaded.model, config.model)
    tensors, tied = loading.checkpoint_tensors(config), _is_tied(loaded.model)
    names = [f"{path}.{part}" for part, _ in embedding.named_parameters() if not (tied and part == "weight")]
    return {name: _stored(tensors, name, config.model).to(loaded.model.dtype) for name in names}


def build_head(
    base: PreTrainedModel, tensors: Mapping[str, Any] | None, name: str, *, dtype: torch.dtype, seed: int = 0
) -> Head:
    """Builds the head of a base model.

    Args:
        base: the loaded base model.
        tensors: lazy tensors of its checkpoint by name; None to draw the head at random.
        name: of the model, for messages.
        dtype: precision of its matrix product.
        seed: of random weights.

    Raises:
        ValueError: see `load_head`.
    """
    model, given, embedding, path = _without_base(base, name)
    generator = torch.Generator().manual_seed(seed)
    spread = getattr(base.config.get_text_config(), "initializer_range", 0.02)
    tied = _is_tied(base)
    own: Any = base.get_input_embeddings()
    for part, parameter in list(embedding.named_parameters()):
        key = f"{path}.{part}"
        if part == "weight" and tied:
            value = own.weight.detach()
        elif tensors is None:
            value = torch.empty(parameter.shape).normal_(0, spread, generator=generator)
        else:
            value = _stored(tensors, key, name)
        if value.shape != parameter.shape:
            raise ValueError(f"--model {name}: its head {key} is {tuple(value.shape)}, not {tuple(parameter.shape)}")
        setattr(embedding, part, nn.Parameter(value.to(own.weight.device, dtype), requires_grad=False))
    return Head(model.eval(), given, embedding.weight)


def _without_base(base: PreTrainedModel, name: str) -> tuple[PreTrainedModel, _Given, Any, str]:
    """Builds the class with a head on the meta device, with `_Given` in place of the base model.

    Returns:
        The model, what stands for its base, its output embedding, and the embedding's dotted path.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto: Any = AutoModelForSeq2SeqLM if base.config.is_encoder_decoder else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model = auto.from_config(base.config, trust_remote_code=False)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"--record loss or vocabulary: transformers has no language-model head for {type(base).__name__}, the "
            f"class of --model {name}"
        ) from error
    given = _Given()
    places = [place for place, child in model.named_children() if type(child) is type(base)]
    places = places or [place for place in ("decoder",) if hasattr(model, place)]
    embedding = model.get_output_embeddings()
    if not places or embedding is None:
        raise ValueError(
            f"--record loss or vocabulary: {type(model).__name__} of --model {name} is not a base model with a head "
            "on it"
        )
    for place in places:
        setattr(model, place, given)
    path = next(path for path, module in model.named_modules() if module is embedding)
    return model, given, embedding, path


def _is_tied(base: PreTrainedModel) -> bool:
    config = base.config.get_text_config()
    return bool(getattr(config, "tie_word_embeddings", False) or getattr(base.config, "tie_word_embeddings", False))


def _stored(tensors: Mapping[str, Any], key: str, name: str) -> torch.Tensor:
    """Reads a tensor by its name, or by the only name that ends with it."""
    found = [key] if key in tensors else [each for each in tensors if each.endswith(f".{key}")]
    if len(found) != 1:
        raise ValueError(
            f"--record loss or vocabulary: the checkpoint of --model {name} has no {key}: it was saved without its head"
        )
    return tensors[found[0]][...]
