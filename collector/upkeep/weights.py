"""Compares the weights of a run's experts once, and keeps the answer in the run: `weights/<model>.parquet`.

The model is the one of run.json, loaded again; its fingerprint must be the recorded one. Nothing of the run is changed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from collector.config import ModelConfig, section
from collector.models import loading
from collector.models.expert_weights import ExpertWeights, cosines, couplings, matched, router_cosines, router_rows
from collector.models.routers import find_routers
from collector.store import tables
from collector.store.run_directory import RUN, WEIGHTS, weights_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from collector.models.routers import Router
    from collector.store.run_directory import RunDirectory

MOST_NEURONS = 4096
"""Experts with more neurons than this are not matched: the Hungarian method takes their cube."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """What was written."""

    file: str
    rows: int
    unmatched: tuple[str, ...] = ()
    """Routers whose experts have too many neurons to match."""


def current(run: RunDirectory) -> str | None:
    """Returns the run's file of comparisons, None if there is none."""
    name = weights_name(run.read_json(RUN))
    return name if name in run.store.list(WEIGHTS) else None


def make(
    run: RunDirectory, *, device: str = "cpu", match: bool = True,
    progress: Callable[[int, int], None] = lambda _done, _all: None, loaded: loading.LoadedModel | None = None,
) -> Made:  # fmt: skip
    """Compares all pairs of experts of every recorded layer, and publishes the table.

    Args:
        run: the run directory.
        device: where the matrices are multiplied.
        match: whether to match neurons, which takes most of the time.
        progress: called with the pairs matched so far and their number.
        loaded: the model, if it is loaded already.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: the model cannot be loaded, is not that of the run, or its experts are not known.
    """
    info = run.read_json(RUN)
    if "imported" in info:
        raise ValueError(
            f"{run.root} was imported from {info['imported']['from']}: there is no model whose weights to read"
        )
    config = section(ModelConfig, info["config"], compile=False)
    model = (loaded or loading.load(config, device)).model
    if (found := loading.fingerprint(model)) != info["model"]["fingerprint"]:
        raise ValueError(
            f"--model {config.model} has other weights than the run's: fingerprint {found[:16]}…, recorded "
            f"{info['model']['fingerprint'][:16]}…; name its --revision, or restore the folder"
        )
    recorded = {(one.stack, one.layer) for one in tables.recorded_layers(info)}
    routers = [router for router in find_routers(model) if (router.stack, router.layer) in recorded]
    weights = [ExpertWeights(router) for router in routers]
    few = [len(one.matrices(0)["up"]) <= MOST_NEURONS for one in weights]
    pairs = sum(
        one.count * (one.count - 1) // 2 for one, matches in zip(weights, few, strict=True) if match and matches
    )
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        progress(done, pairs)

    layers = [
        _layer(router, one, step if match and matches else None)
        for router, one, matches in zip(routers, weights, few, strict=True)
    ]
    table = pa.concat_tables(layers)
    name = weights_name(info)
    with run.scratch() as scratch:
        path = Path(scratch, "weights")
        tables.write_table(path, table)
        run.store.put(name, path.read_bytes())
    unmatched = [router.name for router, matches in zip(routers, few, strict=True) if match and not matches]
    return Made(file=name, rows=len(table), unmatched=tuple(unmatched))


def _layer(router: Router, weights: ExpertWeights, step: Callable[[int], None] | None) -> pa.Table:
    """The rows of one router, measure by measure."""
    rows = [
        _rows(router, measure, values, mirrored=measure != "coupling")
        for measure, values in _measures(router, weights, step)
    ]
    return pa.concat_tables(rows)


def _measures(
    router: Router, weights: ExpertWeights, step: Callable[[int], None] | None
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    for name, values in cosines(weights).items():
        yield ("cosine" if name == "all" else f"cosine_{name}"), values
    if step is not None:
        yield "matched", matched(weights, step)
    rows_eh = router_rows(router, weights.matrices(0)["up"].shape[1])
    if rows_eh is not None:
        yield "router", router_cosines(rows_eh)
        yield "coupling", couplings(weights, rows_eh)


def _rows(router: Router, measure: str, values: NDArray[np.float64], *, mirrored: bool) -> pa.Table:
    """All pairs of experts in both orders; of a measure that is not symmetric, an expert with itself, too."""
    expert, other = np.indices(values.shape).reshape(2, -1)
    kept = expert != other if mirrored else np.ones(len(expert), bool)
    columns: dict[str, Any] = {
        "stack": tables.constant(router.stack, int(kept.sum())), "layer": np.full(kept.sum(), router.layer),
        "measure": tables.constant(measure, int(kept.sum())), "expert": expert[kept], "other_expert": other[kept],
        "value": values.ravel()[kept],
    }  # fmt: skip
    return tables.table_of(tables.WEIGHTS_SCHEMA, columns)
