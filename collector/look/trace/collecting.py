"""Runs a model over one text, in this process, as a run of one document like those of `collector collect`.

So the trace of a text is exactly what a collection would record, and the same query reads it as reads runs of millions
of documents. The run is deleted at the end of the context.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from collector.config import CaptureConfig, DataConfig, ModelConfig, resolve
from collector.fleet import driver
from collector.query import warehouse

if TYPE_CHECKING:
    from collections.abc import Iterator

    from collector.models.loading import LoadedModel
    from collector.query.warehouse import Run


@contextlib.contextmanager
def collected(
    text: str, model: ModelConfig, capture: CaptureConfig, device: Literal["auto", "cpu", "cuda"] = "auto",
    *, loaded: LoadedModel | None = None,
) -> Iterator[Run]:  # fmt: skip
    """Runs the model over a text.

    Args:
        text: the document.
        model: settings of the model.
        capture: which routers to record, and the maximum number of tokens.
        device: where the model runs; `auto` takes a GPU if there is one.
        loaded: the model from `loading.load`, if it is loaded already.

    Yields:
        A complete run whose only document is the text.

    Raises:
        ValueError: the model cannot be loaded or has no such routers, or the text is empty.
    """
    with tempfile.TemporaryDirectory(prefix="collector-trace-") as folder:
        source = Path(folder, "text.jsonl")
        source.write_text(json.dumps({"text": text, "label": "text"}), encoding="utf-8")
        data = DataConfig(data=(str(source),))
        config = resolve(data=data, model=model, capture=capture, device=device_of(device))
        run = warehouse.open_run(driver.collect_in_process(f"{folder}/run", config, loaded=loaded).root)
        if rejected := run.sql("select reason from rejects").fetchall():
            raise ValueError(f"nothing to trace in {text!r}: {rejected[0][0]}")
        yield run


def was_cut(run: Run) -> bool:
    """Whether the text was truncated."""
    return run.sql("select truncated from documents").fetchall() == [(True,)]


def device_of(asked: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """Returns the device to run on.

    Raises:
        ValueError: a GPU was asked for, and there is none.
    """
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU; use --device cpu")
    return "cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu"
