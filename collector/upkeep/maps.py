"""Lays out in a plane what the experts of a layer put out: `maps/<stack>-<layer>-<method>.parquet`.

The points are outputs of chosen experts for sampled tokens, as `--record similarity` keeps them, each divided by its
norm: experts differ in it, and a few massive activations would be all that a map shows. Nothing of the run is changed.

Shapes: P picks, D dimensions of an output.
"""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from collector.query.warehouse import open_run
from collector.store import tables
from collector.store.run_directory import MAPS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from collector.query.warehouse import Run
    from collector.store.run_directory import RunDirectory

FEWEST = 20
"""Outputs below which there is nothing to lay out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """What was written."""

    file: str
    points: int
    outputs: int
    """All that the run has of this router; the points were drawn from them."""
    trustworthiness: float


def make(
    run: RunDirectory, *, layer: int, stack: str | None = None, method: str = "umap", points: int = 5000, seed: int = 0
) -> list[Made]:
    """Makes a map of one router's outputs, and beside it one of their two principal components.

    Args:
        run: the run directory.
        layer: the model's number of the layer.
        stack: the router's stack; may be left out where one router has this number.
        method: `umap`, `tsne` or `pca`.
        points: most points.
        seed: of the drawing and of the method.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: the run has no outputs of this router, or a package is missing.
    """
    _require_packages()
    opened = open_run(run.root)
    stack = _stack(opened, layer, stack)
    keys, output_pd, outputs = _read(opened, stack, layer, points, seed)
    directions_pd = output_pd / np.maximum(np.linalg.norm(output_pd, axis=1, keepdims=True), 1e-12)
    return [
        _write(run, keys, outputs, _lay_out(directions_pd, each, seed), directions_pd, (stack, layer, each, seed))
        for each in dict.fromkeys((method, "pca"))
    ]


def _require_packages() -> None:
    try:
        import sklearn  # noqa: F401
        import umap  # noqa: F401
    except ImportError as error:
        raise ValueError("Maps need packages: pip install 'moe-routing-collector[map]'") from error


def _stack(run: Run, layer: int, stack: str | None) -> str:
    stacks = [one["stack"] for one in run.info["layers"] if one["layer"] == layer]
    if not stacks:
        raise ValueError(
            f"--layer {layer}: not recorded; the run has {sorted({x['layer'] for x in run.info['layers']})}"
        )
    if stack is None and len(stacks) > 1:
        raise ValueError(f"--layer {layer} is in several stacks; name one with --stack: {', '.join(stacks)}")
    if stack is not None and stack not in stacks:
        raise ValueError(f"--stack {stack}: layer {layer} is in {', '.join(stacks)}")
    return stack or stacks[0]


def _read(run: Run, stack: str, layer: int, points: int, seed: int) -> tuple[pa.Table, NDArray[np.float32], int]:
    """Returns the keys of the points, [P, D] their outputs, and how many there are in all."""
    if "similarity" not in (run.info["config"].get("record") or ()):
        raise ValueError("a map needs what --record similarity keeps; this run was collected without")
    where = f"where stack = '{stack}' and layer = {layer}"
    ((count,),) = run.sql(f"select count(*) from projections {where}").fetchall()
    if count < FEWEST:
        raise ValueError(f"a map needs {FEWEST} outputs at least; the run has {count} of {stack} layer {layer}")
    drawn = f"select * from projections {where} order by hash(shard, tok, expert, {seed}) limit {points}"
    rows = run.sql(f"from ({drawn}) order by shard, tok, expert").to_arrow_table()
    values = rows["output"].combine_chunks().values.to_numpy(zero_copy_only=False)
    return rows.select(["shard", "tok", "expert"]), values.reshape(len(rows), -1).astype(np.float32), count


def _lay_out(directions_pd: NDArray[np.float32], method: str, seed: int) -> NDArray[np.float32]:
    """[P, 2] places of the points."""
    if method == "pca":
        from sklearn.decomposition import PCA

        return PCA(2, svd_solver="full").fit_transform(directions_pd)
    if method == "tsne":
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(directions_pd) - 1) / 3)
        return TSNE(init="pca", random_state=seed, perplexity=perplexity).fit_transform(directions_pd)
    import umap

    with warnings.catch_warnings():  # that a seed leaves a single thread
        warnings.simplefilter("ignore")
        neighbours = min(15, len(directions_pd) - 1)
        return umap.UMAP(random_state=seed, n_neighbors=neighbours).fit_transform(directions_pd)


def _write(
    run: RunDirectory, keys: pa.Table, outputs: int, places_p2: NDArray[np.float32],
    directions_pd: NDArray[np.float32], described: tuple[str, int, str, int],
) -> Made:  # fmt: skip
    from sklearn.manifold import trustworthiness

    stack, layer, method, seed = described
    neighbours = min(15, (len(keys) - 1) // 2)
    trusted = float(trustworthiness(directions_pd, places_p2, n_neighbors=neighbours))
    count, name = len(keys), f"{MAPS}/{stack}-{layer}-{method}.parquet"
    columns: dict[str, Any] = {key: keys[key].combine_chunks() for key in keys.column_names} | {
        "stack": tables.constant(stack, count), "layer": np.full(count, layer),
        "method": tables.constant(method, count), "x": places_p2[:, 0], "y": places_p2[:, 1],
        "seed": np.full(count, seed), "trustworthiness": np.full(count, trusted),
    }  # fmt: skip
    table = tables.table_of(tables.MAPS_SCHEMA, columns)
    with run.scratch() as scratch:
        path = Path(scratch, "map")
        tables.write_table(path, table)
        run.store.put(name, path.read_bytes())
    return Made(file=name, points=count, outputs=outputs, trustworthiness=trusted)
