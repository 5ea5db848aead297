"""Runs for the tests of the report: a real one, its untrained twin, and odd geometries with a real run's card."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from collector.config import DataConfig, ModelConfig
from collector.store.run_directory import PLAN, RUN
from collector.store.tables import Layer
from collector.upkeep import maps, weights
from tests.helpers.runs import collect_here, run_config, write_jsonl
from tests.helpers.synthetic import Shard, write_run

LABELS = ("en", "ko", "th", "bg")


def collect_pair(folder: Path, model: str) -> tuple[Path, Path]:
    """40 sentences in four languages through a tiny model, and through the same model with other random weights.

    Of the first all is recorded that needs no head, and its weights are compared and a layer mapped.
    """
    data = DataConfig(data=(str(write_jsonl(folder / "texts.jsonl", 40, LABELS)),), docs_per_shard=16)
    for name, config in (("run", ModelConfig(model=model)), ("random", ModelConfig(model=model, weights="random"))):
        record = ("outputs", "similarity") if name == "run" else ()
        made = collect_here(folder / name, run_config(data, config, record=record, sample_tokens=100))
        if name == "run":
            weights.make(made, match=False)
            maps.make(made, layer=2, method="pca")
    return folder / "run", folder / "random"


def synthetic_run(folder: Path, layers: Sequence[Layer], shards: Sequence[Shard], card: Path) -> Path:
    """A run of these shards that has the card and the plan of another."""
    write_run(folder, layers, shards)
    own, other = (json.loads((each / RUN).read_text()) for each in (folder, card))
    (folder / RUN).write_text(json.dumps(other | own | {"model": other["model"]}))
    shutil.copy(card / PLAN, folder / PLAN)
    return folder


def payload(page: str) -> dict[str, Any]:
    """The data inside a report."""
    packed = re.search(r'<script type="application/octet-stream" id="data">(.*?)</script>', page, re.DOTALL)
    assert packed
    return json.loads(gzip.decompress(base64.b64decode(packed[1])))
