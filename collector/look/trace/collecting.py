"""One text through a model, in this process: a run of one document, as `collector collect` writes them.

So the trace of a text is what a collection would record of it, and the query that reads it is the one that reads runs
of millions of documents. The run goes with the context.
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
        model: which model.
        capture: which routers, and how many tokens at most.
        device: where it runs; `auto` takes a GPU where there is one.
        loaded: what `models.load` gave for this model, if it is there already.

    Yields:
        A complete run whose only document is the text.

    Raises:
        ValueError: the model cannot be loaded or has no such routers, or the text is empty.
    """
    with tempfile.TemporaryDirectory(prefix="collector-trace-") as folder:
        source = Path(folder, "text.jsonl")
        source.write_text(json.dumps({"text": text, "label": "text"}), encoding="utf-8")
        data = DataConfig(data=(str(source),))
        config = resolve(data=data, model=model, capture=capture, device=_device(device))
        run = warehouse.open_run(driver.collect_in_process(f"{folder}/run", config, loaded=loaded).root)
        if rejected := run.sql("select reason from rejects").fetchall():
            raise ValueError(f"nothing to trace in {text!r}: {rejected[0][0]}")
        yield run


def was_cut(run: Run) -> bool:
    """Whether the text was longer than what the model was given."""
    return run.sql("select truncated from documents").fetchall() == [(True,)]


def _device(asked: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU; use --device cpu")
    return "cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu"
