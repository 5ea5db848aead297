"""Downloads a model's files ahead of their use, removes them from the hub's cache, and tells tokenizers apart.

The files are asked for by the same functions that load them, so these are exactly the files that a replica on this
machine will find in the cache.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
from typing import TYPE_CHECKING, Any

from collector.models import loading, locations, weight_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from huggingface_hub import CachedRevisionInfo

    from collector.config import ModelConfig

_WEIGHTS = (".safetensors", ".bin")


class Downloads:
    """Models on the hub, downloaded in turn, each while the one before it is used.

    The thread does not outlive the program: what it leaves half-done, the next download completes.
    """

    def __init__(self, configs: Iterable[ModelConfig], before: Callable[[ModelConfig], None]) -> None:
        """Starts with the first.

        Args:
            configs: the models.
            before: called before each download.
        """
        self._configs = iter(configs)
        self._before = before
        self._start()

    def wait(self) -> None:
        """Returns when the next model is there, and starts with the one after it.

        Raises:
            ValueError: it cannot be had.
        """
        self._thread.join()
        error = self._error
        self._start()
        if error is not None:
            raise error

    def _start(self) -> None:
        self._error: ValueError | None = None
        self._thread = threading.Thread(target=self._fetch_next, name="download", daemon=True)
        self._thread.start()

    def _fetch_next(self) -> None:
        for config in itertools.islice(self._configs, 1):
            try:
                self._before(config)
                fetch(config)
            except ValueError as error:
                self._error = error
            except Exception as error:  # noqa: BLE001 - a thread has nobody to tell
                self._error = ValueError(f"cannot download --model {config.model!r} {config.revision}: {error}")


def fetch(config: ModelConfig) -> None:
    """Downloads config, tokenizer and weights of a model, as far as they are not in the cache.

    Raises:
        ValueError: they cannot be had; the message says why.
    """
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers import AutoConfig

    disable_progress_bars()  # they would run through the progress of the run
    location = locations.resolve(config)
    with locations.telling_remedy(config):
        AutoConfig.from_pretrained(location, revision=config.revision, trust_remote_code=False)
        weight_files.weight_files(location, config.revision)
    loading.load_tokenizer(config)


def cached_weights(model: str, *, commit: str | None = None, revision: str | None = None) -> CachedRevisionInfo | None:
    """Returns what the cache holds of a model, by commit or by branch; None if no weights are among it."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return None
    for one in (one for repo in repositories if repo.repo_id == model for one in repo.revisions):
        if commit == one.commit_hash or revision in one.refs:
            return one if any(file.file_name.endswith(_WEIGHTS) for file in one.files) else None
    return None


def delete_cached(model: str, revision: str, commit: str) -> int:
    """Deletes a revision from the cache if it is of this commit and no other branch or tag names it.

    Returns:
        The bytes that this made free.
    """
    from huggingface_hub import constants, scan_cache_dir

    held = cached_weights(model, revision=revision)
    if held is None or held.commit_hash != commit or held.refs != {revision}:
        return 0
    strategy = scan_cache_dir(constants.HF_HUB_CACHE).delete_revisions(commit)
    strategy.execute()
    return strategy.expected_freed_size


def tokenizer_fingerprint(config: ModelConfig, *, template: bool = False) -> str:
    """Returns a SHA-256 of all that decides which tokens a text becomes; `template`: the chat template counts, too.

    Raises:
        ValueError: there is no tokenizer.
    """
    tokenizer = loading.load_tokenizer(config)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    told: dict[str, Any] = {"vocab": tokenizer.get_vocab()} if backend is None else json.loads(backend.to_str())
    for ours in ("truncation", "padding"):  # how texts are cut and padded is the collector's choice
        told.pop(ours, None)
    if template:
        told["chat_template"] = tokenizer.chat_template
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
