"""Tokenizer and model: pretrained or random weights, in one dtype, on one device, without a head.

The model is the base model (`AutoModel`): routing needs no language-model head. Random weights are
drawn under a seed straight in the target dtype, so every replica of a run holds the same ones.
`fingerprint` tells whether two replicas do. Finding the routers is the business of `routers`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

import torch

from collector.config import DEMO, ModelConfig
from collector.demo.corpus import MODEL_DIR

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

_FINGERPRINT_SAMPLES = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """What a replica runs."""

    model: PreTrainedModel
    tokenizer: Any
    device: torch.device

    @property
    def pad_id(self) -> int:
        """Any valid id: padding is masked, and no record shows it."""
        for candidate in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if candidate is not None:
                return int(candidate)
        return 0


def load(config: ModelConfig, device: str) -> LoadedModel:
    """Loads tokenizer and model, ready to run.

    Raises:
        ValueError: the repository is missing or gated, or tokenizer and model do not fit together.
    """
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    location = _location(config)
    with _telling_remedy(config):
        architecture = AutoConfig.from_pretrained(location, revision=config.revision)
    tokenizer = load_tokenizer(config)
    dtype: Any = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    if config.weights == "random":
        if dtype == "auto":
            dtype = architecture.dtype or torch.float32
        torch.manual_seed(config.seed)
        model = AutoModel.from_config(architecture, dtype=dtype).to(device)
    else:
        placement = {"device_map": {"": device}} if device != "cpu" else {}
        model = AutoModel.from_pretrained(location, revision=config.revision, dtype=dtype, **placement)
    _check_vocabulary(model, tokenizer)
    return LoadedModel(model=model.eval(), tokenizer=tokenizer, device=torch.device(device))


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer; ValueError if there is none."""
    from transformers import AutoTokenizer

    with _telling_remedy(config):
        return AutoTokenizer.from_pretrained(_location(config), revision=config.revision)


def _location(config: ModelConfig) -> str:
    return str(MODEL_DIR) if config.model == DEMO else config.model


@contextlib.contextmanager
def _telling_remedy(config: ModelConfig) -> Iterator[None]:
    """Transformers answers a missing, gated or unreachable repository with an OSError."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot load --model {config.model!r}: {error}\nCheck the id or path, and for a gated repository "
            "accept its terms and set HF_TOKEN."
        ) from error


def _check_vocabulary(model: PreTrainedModel, tokenizer: Any) -> None:
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} entries but the model embeds only {rows}: "
            "it belongs to another model, or tokens were added without resizing the embedding"
        )


def hints(loaded: LoadedModel) -> list[str]:
    """Advice on settings that work but are needlessly slow here."""
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    slow = has.get("architecture") == "x86_64" and not (has.get("avx512_bf16") or has.get("amx_bf16"))
    if slow and loaded.device.type == "cpu" and loaded.model.dtype == torch.bfloat16:
        return ["this CPU has no bfloat16 arithmetic: --dtype float32 is several times faster, at twice the memory"]
    return []


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over names, shapes, dtypes and 256 evenly spaced values of every parameter and buffer.

    Tells replicas and runs with different weights apart without reading every byte; two models that
    differ only between the sampled values are taken for the same.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // _FINGERPRINT_SAMPLES)
        sample = flat[::step][:_FINGERPRINT_SAMPLES].contiguous().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def readable_vocabulary(tokenizer: Any) -> list[tuple[int, str, bool]]:
    """(token id, readable text, is special) of every entry, by id.

    Byte-level pieces are decoded; a piece that is no whole UTF-8 sequence shows its bytes as
    `<E3><81>`.
    """
    special = set(tokenizer.all_special_ids)
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    return [(i, names[i] if i in special else _readable(tokenizer, names[i]), i in special) for i in sorted(names)]


def _readable(tokenizer: Any, token: str) -> str:
    text = tokenizer.convert_tokens_to_string([token])
    if "\ufffd" not in text:
        # Some decoders swallow the space that opens a word.
        return " " + text if token[0] in "▁Ġ" and not text.startswith(" ") else text
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    if all(character in byte_of for character in token):
        return "".join(f"<{byte_of[character]:02X}>" for character in token)
    return token
