"""Loads tokenizer and model: pretrained or random weights, quantized or not, on one device or several.

The model is the base model (`AutoModel`), because routing needs no language-model head. An empty
model of the same architecture reveals errors before anything is downloaded or allocated: a dense
model, a tokenizer that does not fit, too little memory. Random weights are drawn from a seed on the
host, directly in the target dtype, so every replica of a run has the same weights, whatever its
device. `fingerprint` makes it possible to check that.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from typing import TYPE_CHECKING, Any

import torch

from collector.config import ModelConfig, Spread
from collector.models import arithmetic, checkpoints, compiling, footprint, locations, quantization, weight_files
from collector.models.routers import find_routers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEMO_MODEL = locations.DEMO_MODEL
"""The folder of the embedded checkpoint."""

_FINGERPRINT_SAMPLES = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A loaded model with its tokenizer and device."""

    model: PreTrainedModel
    tokenizer: Any
    device: torch.device
    """Device of the inputs."""
    compute_dtype: torch.dtype
    """Precision of matrix multiplications."""

    @property
    def pad_id(self) -> int:
        """Token id for padding; any valid id will do, because padding is masked and never recorded."""
        for candidate in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if candidate is not None:
                return int(candidate)
        return 0


def load(config: ModelConfig, device: str, spread: Spread | None = None) -> LoadedModel:
    """Loads tokenizer and model, ready to run.

    Args:
        config: which model, in which precision.
        device: `cpu` or `cuda`.
        spread: how to spread the weights over several devices (default: one device holds them all).

    Raises:
        ValueError: the repository is missing or gated, the checkpoint does not fit the architecture,
            tokenizer and model do not fit together, the model has no router, there is not enough
            memory for it, or the quantization would leave its experts unquantized.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:  # the important warnings are errors here
        logging.set_verbosity_error()
    location = locations.resolve(config)
    with locations.telling_remedy(config):
        architecture = AutoConfig.from_pretrained(location, revision=config.revision, trust_remote_code=False)
    tokenizer = load_tokenizer(config)
    # Ray shows this process only its own GPUs, so index 0 is the right one.
    target = torch.device(device, 0) if device == "cuda" else torch.device(device)
    stored = _own_quantization(architecture)
    if stored is not None and config.weights == "random":
        del architecture.quantization_config
        stored = None
    dtype = architecture.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    empty = _empty(architecture, dtype or torch.float32)
    _check_vocabulary(empty, tokenizer)
    find_routers(empty)
    if spread is not None and spread.offload != "none" and (stored is not None or config.quantization != "none"):
        raise ValueError("--offload moves plain weights only: leave out --quantization, or use --gpus-per-replica")
    if config.compile and (spread is not None or stored is not None or config.quantization != "none"):
        raise ValueError("--compile takes plain weights on one device: leave it out, or --quantization and --offload")
    if dtype is None:
        read = config.weights == "pretrained"
        dtype = weight_files.stored_dtype(checkpoint_tensors(config)) if read else torch.float32
    if stored is None:  # the size of a quantized checkpoint is known only to its own quantizer
        footprint.require_room(config, empty, dtype, target, spread)
    method = _method(config, stored, empty)
    if config.weights == "random":
        model = _random(config, architecture, dtype, method, target, spread)
    else:
        model = _pretrained(config, type(empty), architecture, dtype, method, target, spread)
    if config.quantization in ("nf4", "fp4"):  # completes a partly quantized checkpoint
        quantization.quantize_model(model, config.quantization, double=config.double_quantization)
    _check_experts(config, model)
    compute = arithmetic.resolve(config.compute_dtype, dtype, target)
    arithmetic.apply(model, dtype, compute, target)
    if config.compile:
        compiling.compile_parts(model)
    return LoadedModel(model=model.eval(), tokenizer=tokenizer, device=target, compute_dtype=compute)


def load_tokenizer(config: ModelConfig) -> Any:
    """Loads the model's tokenizer; raises ValueError if there is none."""
    from transformers import AutoTokenizer

    location = locations.resolve(config)
    with locations.telling_remedy(config, "its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(location, revision=config.revision, trust_remote_code=False)
        # Without its files transformers makes one that knows special tokens only.
        if set(tokenizer.get_vocab().values()) <= set(tokenizer.added_tokens_decoder):
            raise ValueError("there is none beside its config.json; copy that of the model it was made from")
    return tokenizer


# -- weights -----------------------------------------------------------------------------------------


def checkpoint_tensors(config: ModelConfig) -> dict[str, Any]:
    """Returns the tensors of a model's checkpoint by name, each read when it is sliced (`tensor[...]`)."""
    with locations.telling_remedy(config, "its weights"):
        return weight_files.lazy_tensors(weight_files.weight_files(locations.resolve(config), config.revision))


def _empty(architecture: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Builds the model on the meta device: all shapes, but no memory."""
    from transformers import AutoModel

    with torch.device("meta"):
        return AutoModel.from_config(architecture, dtype=dtype, trust_remote_code=False)


def _random(
    config: ModelConfig, architecture: Any, dtype: torch.dtype, method: Any, device: torch.device, spread: Spread | None
) -> PreTrainedModel:
    """Initializes the model at random on the host, so that every device gets the same numbers.

    Raises:
        ValueError: quantized random weights are to be spread, which works for checkpoints only.
    """
    from accelerate import dispatch_model, infer_auto_device_map
    from transformers import AutoModel

    if spread is not None and method is not None:
        raise ValueError("--weights random with --quantization fits one device only: leave one of them out")
    torch.manual_seed(config.seed)
    model = AutoModel.from_config(architecture, dtype=dtype, trust_remote_code=False)
    if method is not None:
        return _fill(type(model), architecture, dtype, method, device, model.state_dict())[0]
    if spread is None:
        return model.to(device)
    places = infer_auto_device_map(
        model, max_memory=footprint.room(device, spread), no_split_module_classes=list(model._no_split_modules or ())
    )
    folder = footprint.offload_folder() if "disk" in places.values() else None
    return dispatch_model(model, places, offload_dir=folder)


def _pretrained(
    config: ModelConfig, kind: type[PreTrainedModel], architecture: Any, dtype: torch.dtype, method: Any,
    device: torch.device, spread: Spread | None,
) -> PreTrainedModel:  # fmt: skip
    if spread is not None:
        model, info = _spread_out(config, kind, dtype, method, device, spread)
    else:
        tensors = checkpoint_tensors(config)
        model, info = _fill(kind, architecture, dtype, method, device, tensors)
    checkpoints.require_complete(config.model, info)
    return model


def _fill(
    kind: type[PreTrainedModel], architecture: Any, dtype: torch.dtype, method: Any, device: torch.device,
    tensors: dict[str, Any],
) -> tuple[PreTrainedModel, dict[str, Any]]:  # fmt: skip
    """Loads tensors one by one to the device, quantizing each before the next is read."""
    build: Any = kind.from_pretrained
    with checkpoints.sparing_memory():
        return build(
            None, config=architecture, state_dict=tensors, dtype=dtype, quantization_config=method,
            device_map={"": str(device)}, output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip


def _spread_out(
    config: ModelConfig, kind: type[PreTrainedModel], dtype: torch.dtype, method: Any, device: torch.device,
    spread: Spread,
) -> tuple[PreTrainedModel, dict[str, Any]]:  # fmt: skip
    """Spreads the model over several GPUs, host memory and disk, as accelerate finds room.

    Raises:
        ValueError: accelerate needs the disk, which is not allowed.
    """
    room = footprint.room(device, spread)
    build: Any = kind.from_pretrained
    with checkpoints.sparing_memory(), locations.telling_remedy(config, "its weights"):
        model, info = build(
            locations.resolve(config), revision=config.revision, dtype=dtype, quantization_config=method,
            device_map="auto",
            max_memory=room, offload_folder=spread.folder or footprint.offload_folder(), output_loading_info=True,
            ignore_mismatched_sizes=True, trust_remote_code=False,
        )  # fmt: skip
    if "disk" in getattr(model, "hf_device_map", {}).values() and spread.offload != "disk":
        raise ValueError(
            f"--model {config.model} does not fit into {footprint.told(room)}: use --offload disk, or more devices"
        )
    return model, info


# -- quantization ------------------------------------------------------------------------------------


def _own_quantization(architecture: Any) -> Any:
    """Returns a checkpoint's own quantization config; bitsandbytes' 4 bits are translated to `FourBitConfig`.

    bitsandbytes' own config leaves fused experts out; ours reads its tensors and can quantize the rest.
    """
    found = getattr(architecture, "quantization_config", None)
    if found is None:
        return None
    values = found if isinstance(found, dict) else found.to_dict()
    if values.get("load_in_4bit") or values.get("_load_in_4bit"):
        kind, double = values.get("bnb_4bit_quant_type", "fp4"), values.get("bnb_4bit_use_double_quant", False)
        architecture.quantization_config = quantization.FourBitConfig(kind, double=double).to_dict()
    return architecture.quantization_config


def _method(config: ModelConfig, stored: Any, empty: PreTrainedModel) -> Any:
    """Returns the quantization_config for transformers; None without quantization, or if the checkpoint has its own."""
    if stored is not None or config.quantization == "none":
        return None
    if config.quantization == "int8-linear":
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[r.name for r in find_routers(empty)])
    return quantization.FourBitConfig(config.quantization, double=config.double_quantization)


def _check_experts(config: ModelConfig, model: PreTrainedModel) -> None:
    """Rejects a quantized model whose experts, its largest part, are not quantized."""
    quantized = config.quantization != "none" or getattr(model, "is_quantized", False)
    if not quantized or config.quantization == "int8-linear" or config.unquantized_experts:
        return
    left = quantization.unquantized_experts(model)
    held = quantization.treatments(model)
    plain = sum(part.parameters for how, part in held.items() if "float" in how)
    body = sum(part.parameters for part in held.values()) - _embedded(model)
    if left or plain - _embedded(model) > body / 2:
        raise ValueError(
            f"{len(left)} experts' tensors of --model {config.model}, and {footprint.count(plain)} parameters in all, "
            f"are not quantized ({', '.join(left[:2]) or 'their layers are of a kind that has no 4-bit form'} …): use "
            "--quantization nf4 where the checkpoint left them out, or accept it with --unquantized-experts"
        )


def _embedded(model: PreTrainedModel) -> int:
    embedding: Any = model.get_input_embeddings()
    return embedding.weight.numel()


def _check_vocabulary(model: PreTrainedModel, tokenizer: Any) -> None:
    """Rejects a tokenizer that gives texts ids beyond the embedding.

    Added tokens beyond it do not count, unless the tokenizer puts them around every text: texts hardly ever spell them,
    and one that does becomes a bad row.
    """
    rows = embedded_ids(model)
    added = set(tokenizer.added_tokens_decoder)
    ids = [number for number in tokenizer.get_vocab().values() if number not in added] + tokenizer("a")["input_ids"]
    if (largest := max(ids)) >= rows:
        raise ValueError(
            f"the tokenizer gives texts ids up to {largest}, but the model embeds only {rows}: "
            "it belongs to another model, or tokens were added without resizing the embedding"
        )


def embedded_ids(model: PreTrainedModel) -> int:
    """Returns the number of token ids that a model embeds, from 0."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


def fingerprint(model: PreTrainedModel) -> str:
    """Returns a SHA-256 of names, shapes, dtypes and 256 evenly spaced values of every parameter and buffer.

    It distinguishes replicas and runs with different weights without reading every byte. Two models
    that differ only between the sampled values get the same fingerprint.
    """
    from accelerate.utils import align_module_device

    prints = {name: _print(tensor) for name, tensor in model.state_dict().items() if not tensor.is_meta}
    for path, module in model.named_modules() if hasattr(model, "hf_device_map") else ():
        with align_module_device(module, "cpu"):  # loads weights that are offloaded to disk
            own = module.state_dict(prefix=f"{path}." if path else "")
            prints |= {
                name: _print(tensor) for name, tensor in own.items() if name not in prints and not tensor.is_meta
            }
    return hashlib.sha256("".join(f"{name} {prints[name]}\n" for name in sorted(prints)).encode()).hexdigest()


def _print(tensor: torch.Tensor) -> str:
    flat = tensor.detach().reshape(-1)
    step = max(1, flat.numel() // _FINGERPRINT_SAMPLES)
    sample = flat[::step][:_FINGERPRINT_SAMPLES].contiguous().cpu().view(torch.uint8).numpy().tobytes()
    return f"{tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(sample).hexdigest()}"


def readable_vocabulary(tokenizer: Any) -> list[tuple[int, str, bool]]:
    """Returns (token id, readable text, is special) of every entry, by id.

    Byte-level pieces are decoded; a piece that is not valid UTF-8 on its own shows its bytes as
    `<E3><81>`.
    """
    special = set(tokenizer.all_special_ids)
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    return [(i, names[i] if i in special else _readable(tokenizer, names[i]), i in special) for i in sorted(names)]


def _readable(tokenizer: Any, token: str) -> str:
    text = tokenizer.convert_tokens_to_string([token])
    if "\ufffd" not in text:
        # Some decoders drop the space at the start of a word.
        return " " + text if token[0] in "▁Ġ" and not text.startswith(" ") else text
    byte_of = _byte_of()
    if all(character in byte_of for character in token):
        return "".join(f"<{byte_of[character]:02X}>" for character in token)
    return token


@functools.cache
def _byte_of() -> dict[str, int]:
    """The byte that a character stands for in byte-level vocabularies."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}
