"""Tells where a model's files are, refuses what is no model, and explains why one cannot be reached."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from collector.config import DEMO

if TYPE_CHECKING:
    from collections.abc import Iterator

    from collector.config import ModelConfig

DEMO_MODEL = Path(__file__).parents[1] / "demo" / "model"
"""The folder of the embedded checkpoint."""

_ADAPTER = "adapter_config.json"
_REMEDIES = {
    "GatedRepoError": "accept its terms on the hub, and set HF_TOKEN",
    "RepositoryNotFoundError": "check the id; for a private repository set HF_TOKEN",
    "RevisionNotFoundError": "check --revision",
    "LocalEntryNotFoundError": "check the network, or download it and give its folder",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set and it is not in the cache: download it first (hf download)",
    "ConnectionError": "check the network, or download it and give its folder",
    "ConnectError": "check the network, or download it and give its folder",
    "HFValidationError": "an id is NAME or OWNER/NAME; a folder must exist",
}
"""Name of an exception of the hub -> what to do."""


def resolve(config: ModelConfig) -> str:
    """Returns the folder, or the id on the hub, of a model.

    Raises:
        ValueError: it is a path without a model, or an adapter, with or without its base model's weights.
    """
    if config.model == DEMO:
        return str(DEMO_MODEL)
    folder = Path(config.model).expanduser()
    if folder.is_dir():
        _refuse_adapter(config, folder / _ADAPTER)
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"--model {config.model}: the folder has no config.json, so it is no model of transformers"
            )
        return str(folder)
    if folder.exists():
        raise ValueError(f"--model {config.model} is a file: give the folder with its config.json")
    if config.model.startswith(("/", "./", "../", "~")) or config.model.count("/") > 1:
        raise ValueError(f"--model {config.model}: there is no such folder")
    _refuse_adapter(config, _cached_adapter(config))
    return config.model


def _cached_adapter(config: ModelConfig) -> Path | None:
    """Returns the adapter's config of a repository on the hub, None if it has none or cannot be reached."""
    from transformers.utils.hub import cached_file

    with contextlib.suppress(OSError, ValueError):  # told when the model's own config is asked for
        found = cached_file(
            config.model, _ADAPTER, revision=config.revision, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
        return None if found is None else Path(found)
    return None


def cached_commit(config: ModelConfig) -> str | None:
    """Returns the commit that the cache holds of a model on the hub; None of a folder."""
    from huggingface_hub import constants, try_to_load_from_cache

    location = resolve(config)
    if Path(location).is_dir():
        return None
    found = try_to_load_from_cache(
        location, "config.json", cache_dir=constants.HF_HUB_CACHE, revision=config.revision or "main"
    )
    return Path(found).parent.name if isinstance(found, str) else None


def _refuse_adapter(config: ModelConfig, path: Path | None) -> None:
    if path is None or not path.is_file():
        return
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path") or "its base model"
    except (ValueError, AttributeError):
        base = "its base model"
    raise ValueError(
        f"--model {config.model} holds an adapter ({_ADAPTER}) for {base}, without which the routing would be that of "
        "the base model: merge them (peft: AutoPeftModelForCausalLM.from_pretrained, merge_and_unload, "
        "save_pretrained) and give the merged model's folder"
    )


@contextlib.contextmanager
def telling_remedy(config: ModelConfig, part: str = "") -> Iterator[None]:
    """Turns the errors of transformers about a missing, gated or unreachable repository into one with a remedy.

    Args:
        config: of the model.
        part: of the model, that is being read.

    Raises:
        ValueError: instead of them.
    """
    try:
        yield
    except ImportError as error:
        raise ValueError(f"cannot load {part or 'it'} of --model {config.model!r}: {_first_line(error)}") from error
    except (OSError, ValueError) as error:
        what = f"cannot load {f'{part} of ' if part else ''}--model {config.model!r}"
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{what}: it needs code of its own (auto_map in its config.json), which the collector never runs; it "
                "reads the families that transformers has code for: see collector models"
            ) from error
        if remedy := _remedy(error):
            raise ValueError(f"{what}: {remedy} ({_first_line(error)})") from error
        raise ValueError(f"{what}: {error}") from error


def _remedy(error: BaseException) -> str:
    """Returns what to do about the first cause that is known."""
    cause: BaseException | None = error
    while cause is not None:
        for kind in type(cause).__mro__:
            if kind.__name__ in _REMEDIES:
                return _REMEDIES[kind.__name__]
        cause = cause.__cause__ or cause.__context__
    return ""


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
