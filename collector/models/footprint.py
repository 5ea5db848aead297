"""Computes the memory that a model needs before it is loaded, and reports what it takes afterwards.

The computation before loading uses an empty model of the same architecture and is exact for the
parameters. Activations depend on `--tokens-per-batch` and are not counted.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from collector.models import quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from collector.config import ModelConfig, Spread

_OFFLOAD = "collector-offload"
_BITS_OF_SCALES = {True: 8 / 64 + 32 / (64 * 256), False: 32 / 64}
"""Bits of the scales per 4-bit parameter, by whether the scales are quantized too."""


# -- before ------------------------------------------------------------------------------------------


def free_bytes(device: torch.device) -> int:
    """Returns the free memory of a device; on the host, within the limit of the container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    try:
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):  # no control group, or one without a limit ("max")
        return free
    return free


def room(device: torch.device, spread: Spread | None) -> dict[Any, int]:
    """Returns the bytes that weights may take, by device."""
    if device.type == "cuda":
        several = range(torch.cuda.device_count()) if spread is not None else [0]
        found: dict[Any, int] = {index: free_bytes(torch.device("cuda", index)) for index in several}
        if spread is None or spread.offload == "none":
            return found
    else:
        found = {}
    host = free_bytes(torch.device("cpu"))
    if spread is not None and spread.host_memory is not None:
        from accelerate.utils import convert_file_size_to_int

        host = min(host, convert_file_size_to_int(spread.host_memory))
    return found | {"cpu": host}


def told(room: dict[Any, int]) -> str:
    """Formats `room` for a message."""
    return ", ".join(f"{size(taken)} on {place if place == 'cpu' else f'GPU {place}'}"
                     for place, taken in room.items())  # fmt: skip


def _required(empty: PreTrainedModel, dtype: torch.dtype, how: str, *, double: bool) -> int:
    """Returns the bytes of a model's parameters under a quantization."""
    converted = quantization.targets(empty) if how != "none" else set()
    if how == "int8-linear":
        converted = {
            name for name in converted if isinstance(empty.get_submodule(name.rpartition(".")[0]), torch.nn.Linear)
        }
    bits = 8.0 if how == "int8-linear" else 4 + _BITS_OF_SCALES[double]
    total = 0.0
    for name, parameter in empty.named_parameters():
        total += parameter.numel() * (bits / 8 if name in converted else dtype.itemsize)
    return int(total)


def require_room(
    config: ModelConfig, empty: PreTrainedModel, dtype: torch.dtype, device: torch.device, spread: Spread | None
) -> None:
    """Rejects a model that is too large before minutes of loading, and suggests what would fit.

    Raises:
        ValueError: the weights are larger than the free memory.
    """
    if spread is not None and spread.offload == "disk":
        return
    places = room(device, spread)
    free = sum(places.values())
    needed = _required(empty, dtype, config.quantization, double=config.double_quantization)
    if needed <= free:
        return
    others = {
        "--dtype bfloat16": _required(empty, torch.bfloat16, "none", double=False),
        "--quantization nf4": _required(empty, dtype, "nf4", double=True),
    }
    fits = [f"{flag} ({size(taken)})" for flag, taken in others.items() if taken < min(needed, free)]
    remedy = f"{' or '.join(fits)} would fit" if fits else (
        "no precision fits: use --gpus-per-replica, --offload, or a larger machine"
    )  # fmt: skip
    how = "" if config.quantization == "none" else f" with --quantization {config.quantization}"
    raise ValueError(
        f"--model {config.model} takes {size(needed)} in {str(dtype).removeprefix('torch.')}{how}, "
        f"but free are {told(places)}; {remedy}"
    )


def offload_folder() -> str:
    """Creates this process's folder for offloaded weights, after removing those of processes that were killed."""
    root = Path(tempfile.gettempdir())
    for left in root.glob(f"{_OFFLOAD}-*"):
        if not psutil.pid_exists(int(left.name.rpartition("-")[2])):
            shutil.rmtree(left, ignore_errors=True)
    folder = root / f"{_OFFLOAD}-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    return str(folder)


# -- after -------------------------------------------------------------------------------------------


def describe(model: PreTrainedModel, compute_dtype: torch.dtype) -> dict[str, Any]:
    """Describes how the parameters are stored, for run.json.

    Returns:
        `treatments` (parameters and bytes by storage format), `bytes` in total, `bytes_bfloat16` of
        the same parameters in bfloat16, `compute_dtype`, and all of it in one line as `summary`.
    """
    held = quantization.treatments(model)
    described: dict[str, Any] = {
        "treatments": {how: dataclasses.asdict(part) for how, part in held.items()},
        "bytes": sum(part.bytes for part in held.values()),
        "bytes_bfloat16": 2 * sum(part.parameters for part in held.values()),
        "compute_dtype": str(compute_dtype).removeprefix("torch."),
    }
    return described | {"summary": _summary(described)}


def _summary(description: dict[str, Any]) -> str:
    parts = [f"{count(part['parameters'])} in {how}" for how, part in description["treatments"].items()]
    taken, plain = description["bytes"], description["bytes_bfloat16"]
    saved = f", {size(plain - taken)} less than in bfloat16" if taken < plain else ""
    computed = description["compute_dtype"]
    return f"{', '.join(parts)}; {size(taken)}{saved}; multiplied in {computed}"


def size(number: int) -> str:
    """Formats a number of bytes in MB or GB."""
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


def count(number: int) -> str:
    """Formats a large number with three digits: 6.71 B, 105 M."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {letter}"
    return str(number)
