"""Checks that a checkpoint fits its model, spares memory while it is loaded, and writes quantized checkpoints.

A tensor that the model has and the checkpoint lacks is an error, never a random value.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from collector.models.weight_files import INDEX, SINGLE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedModel

_ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"
_NAMED = 5
_SHARD_BYTES = 4 * 2**30


def require_complete(location: str, info: Mapping[str, Any]) -> None:
    """Checks that every tensor of the model came from the checkpoint.

    Args:
        location: of the checkpoint, for the message.
        info: `loading_info` of `from_pretrained`.

    Raises:
        ValueError: tensors are missing or have another shape.
    """
    missing, mismatched = sorted(info["missing_keys"]), sorted(info["mismatched_keys"])
    if not (missing or mismatched):
        return
    unknown = sorted(info["unexpected_keys"])
    parts = [
        f"the model's tensors {_some(missing)} are not in it" if missing else "",
        f"tensors of another shape: {_some([f'{n} {tuple(a)} instead of {tuple(b)}' for n, a, b in mismatched])}"
        if mismatched else "",
        f"it has {_some(unknown)} instead" if unknown and missing else "",
    ]  # fmt: skip
    raise ValueError(
        f"the checkpoint {location} does not fit its model: {'; '.join(part for part in parts if part)}. "
        "Its layout may be older or newer than this version of transformers knows"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def require_empty(folder: Path) -> None:
    """Raises ValueError if a folder is not empty."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; choose another folder")


def save(
    model: PreTrainedModel, tokenizer: Any, folder: Path, head: Mapping[str, torch.Tensor] | None = None
) -> int:  # fmt: skip
    """Writes a model with its weights as held in memory, quantized or not, to a folder that `collector` can load.

    Args:
        model: the base model.
        tokenizer: of the model.
        folder: where to write, new or empty.
        head: tensors of its language-model head, which are no part of it.

    Returns:
        The size of its weights in bytes.

    Raises:
        ValueError: the folder is not empty.
    """
    require_empty(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = total = 0
    for name, tensor in (_unshared(model.state_dict()) | dict(head or {})).items():
        count = tensor.numel() * tensor.itemsize
        if size and size + count > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size, total = size + count, total + count
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [SINGLE]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return total


def _unshared(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keeps one name per storage: tied embeddings are written once and tied again on loading."""
    seen: set[tuple[int, int]] = set()
    kept = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.numel())
        if tensor.numel() == 0 or key not in seen:
            seen.add(key)
            kept[name] = tensor
    return kept


@contextlib.contextmanager
def sparing_memory() -> Iterator[None]:
    """Makes transformers load one tensor at a time, and afterwards returns freed memory to the system.

    By default transformers reads ahead in threads, faster than tensors can be quantized.
    """
    before = os.environ.get(_ONE_BY_ONE)
    os.environ[_ONE_BY_ONE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ONE_BY_ONE]
        else:
            os.environ[_ONE_BY_ONE] = before
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps freed memory for reuse
        if trim is not None:
            trim(0)
