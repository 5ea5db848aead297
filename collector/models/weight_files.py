"""Finds the weight files of a checkpoint, and reads them tensor by tensor.

Safetensors are preferred: they are read with pread instead of a memory map, because every page read through a mapping
counts as resident until the mapping is closed, so a 14 GB file would cost 14 GB on top of the quantized model. Where a
checkpoint has only pickled files (`pytorch_model.bin`), these are mapped, and each tensor is copied out when it is
needed. Unpickling is limited to tensors: a file that needs anything more is refused, because it could run any code.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_USUAL = (SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
_VARIANT = re.compile(
    r"(?:model|pytorch_model)\.(?P<variant>[\w-]+?)(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)"
    r"|(?:model\.safetensors|pytorch_model\.bin)\.index\.(?P<of_index>[\w-]+)\.json"
)
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.(?P<kind>safetensors|bin)")
_OTHER_FORMATS = {
    ".gguf": "GGUF", ".h5": "TensorFlow", ".msgpack": "Flax", ".pth": "a PyTorch file", ".pt": "a PyTorch file",
    ".ckpt": "Lightning", ".onnx": "ONNX", ".nemo": "NeMo", ".npz": "NumPy",
}  # fmt: skip
_NAMED = 5


def weight_files(location: str, revision: str | None) -> list[str]:
    """Returns the local paths of a checkpoint's weight files, downloading them from the hub if needed.

    A variant (`model.fp16.safetensors`) is taken where it is the only one and there are no plain files, and shards
    without an index where all of them are there.

    Raises:
        ValueError: there are none, or not all; the message says what there is.
        OSError: the repository is missing, gated or unreachable.
    """
    for name in _USUAL:
        if (path := _cached(location, name, revision)) is not None:
            return _with_shards(location, path, revision)
    names = _names(location, revision)
    if variants := _variants(names):
        if len(variants) > 1:
            raise ValueError(
                f"{location} has no plain weights but the variants {', '.join(sorted(variants))}: put the one that you "
                "want into a folder of its own, without the variant in its file names"
            )
        ((_, files),) = variants.items()
        index = [name for name in files if name.endswith(".json")]
        paths = [_cached(location, name, revision) for name in index[:1] or files]
        return _with_shards(location, str(paths[0]), revision) if index else sorted(map(str, paths))
    if shards := [name for name in names if _SHARD.fullmatch(name)]:
        return sorted(str(_cached(location, name, revision)) for name in _whole(location, shards))
    raise ValueError(f"{location} {_what_else(names)}")


def _cached(location: str, name: str, revision: str | None) -> str | None:
    """Returns the local path of a file of a folder or repository, None if it has none of this name."""
    from transformers.utils.hub import cached_file

    path: str | None = cached_file(location, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return path


def _with_shards(location: str, path: str, revision: str | None) -> list[str]:
    """Returns the shards that an index names, or the file itself."""
    if not path.endswith(".json"):
        return [path]
    listed = sorted(set(json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"].values()))
    found = {name: _cached(location, name, revision) for name in listed}
    if missing := [name for name, shard in found.items() if shard is None]:
        raise ValueError(
            f"{location} lacks {_some(missing)} of the {len(listed)} shards that {PurePosixPath(path).name} lists: "
            "download them again"
        )
    return [str(shard) for shard in found.values()]


def _whole(location: str, shards: Sequence[str]) -> list[str]:
    """Returns shards without an index, if they are all that there were."""
    parts = [match for name in shards if (match := _SHARD.fullmatch(name))]
    kinds = sorted({(part["stem"], part["count"], part["kind"]) for part in parts})
    stem, count, kind = kinds[-1]  # safetensors before bin
    own = [part for part in parts if (part["stem"], part["count"], part["kind"]) == (stem, count, kind)]
    numbers = {int(part["number"]) for part in own}
    if missing := sorted(set(range(1, int(count) + 1)) - numbers):
        lacking = _some([f"{stem}-{number:05d}-of-{count}.{kind}" for number in missing])
        raise ValueError(f"{location} lacks {lacking} and has no index of its shards: download it again, as a whole")
    return [part[0] for part in own]


def _names(location: str, revision: str | None) -> list[str]:
    """Returns the names of all files in a folder or repository."""
    if Path(location).is_dir():
        return sorted(path.name for path in Path(location).iterdir() if path.is_file())
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from requests import ConnectionError as Unreachable

    try:
        return sorted(HfApi().list_repo_files(location, revision=revision))
    except (HfHubHTTPError, OfflineModeIsEnabled, Unreachable, OSError):
        known = _cached(location, "config.json", revision)
        return [] if known is None else sorted(path.name for path in Path(known).parent.iterdir())


def _variants(names: Sequence[str]) -> dict[str, list[str]]:
    """Returns the files of each variant; safetensors only where there are any."""
    found: dict[str, list[str]] = {}
    for name in names:
        if match := _VARIANT.fullmatch(name):
            found.setdefault(match["variant"] or match["of_index"], []).append(name)
    return {variant: [n for n in files if "safetensors" in n] or files for variant, files in found.items()}


def _what_else(names: Sequence[str]) -> str:
    """Describes a checkpoint without weights that can be read."""
    if "adapter_model.safetensors" in names or "adapter_model.bin" in names:
        return "holds an adapter and no model: merge it into its base model (peft: merge_and_unload, save_pretrained)"
    others = {
        _OTHER_FORMATS[suffix]: name for name in names if (suffix := PurePosixPath(name).suffix) in _OTHER_FORMATS
    }
    if others:
        told = ", ".join(f"{kind} ({name})" for kind, name in others.items())
        return f"has its weights only as {told}: convert them to safetensors with transformers' save_pretrained"
    if any(name.endswith(".safetensors") for name in names):
        own = _some([name for name in names if name.endswith(".safetensors")])
        return f"has {own}, but neither {SINGLE} nor {INDEX}: name its weights as transformers does, or add the index"
    return f"has no weights: neither {SINGLE} nor {INDEX} nor pytorch_model.bin"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


# -- reading -----------------------------------------------------------------------------------------


def lazy_tensors(files: Sequence[str]) -> dict[str, Any]:
    """Returns lazy slices by tensor name; `slice[...]` reads a tensor into its own memory.

    Raises:
        ValueError: a pickled file holds more than tensors.
    """
    tensors: dict[str, Any] = {}
    for file in files:
        if file.endswith(".safetensors"):
            opened: Any = safe_open(file, framework="pt", device="cpu", backend="pread")
            tensors.update({name: opened.get_slice(name) for name in opened.keys()})  # noqa: SIM118 - no iterator
        else:
            tensors.update({name: _Pickled(tensor) for name, tensor in _unpickled(file).items()})
    return tensors


class _Pickled:
    """A tensor in a mapped file, with the methods of a slice of safetensors."""

    _DTYPES: Mapping[torch.dtype, str] = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._tensor[index].clone()

    def get_shape(self) -> list[int]:
        """Returns its shape."""
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        """Returns its precision, by safetensors' name for floats."""
        return self._DTYPES.get(self._tensor.dtype, str(self._tensor.dtype))


def _unpickled(file: str) -> dict[str, torch.Tensor]:
    """Returns the tensors of a pickled file, mapped where its format allows it (zip, since PyTorch 1.6)."""
    try:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds more than tensors, and unpickling it could run any code: if you trust it, load it once with "
            "torch.load(weights_only=False) and write it with transformers' save_pretrained"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{file} cannot be read: {str(error).splitlines()[0]}; download it again") from error
    if isinstance(content, dict) and len(content) == 1 and isinstance(inner := next(iter(content.values())), dict):
        content = inner  # {"state_dict": …}, as training frameworks write it
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{file} holds something else than named tensors: it is no transformers checkpoint")
    return content


def stored_dtype(tensors: Mapping[str, Any]) -> torch.dtype:
    """Returns the precision of most values of a checkpoint."""
    names = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        kind = tensor.get_dtype()
        counts[kind] = counts.get(kind, 0) + math.prod(tensor.get_shape())
    floats = {kind: count for kind, count in counts.items() if kind in names}
    return names[max(floats, key=floats.__getitem__)] if floats else torch.float32
