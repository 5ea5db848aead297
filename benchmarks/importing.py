"""How fast a dump in the format of FLAME-MoE-Traces becomes a run, and in how much memory.

    python benchmarks/importing.py [--tokens 2000000] [--layers 8] [--folder FOLDER]

Writes a synthetic checkpoint (64 experts, top-6; expert popularity falls as 1/rank, scores are a softmax), imports it
in a process of its own, and prints tokens per second, the peak memory of that process, and the sizes of both.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

EXPERTS, TOP_K = 64, 6
GROUP = 1 << 20
"""Rows of a row group, as large as pyarrow makes them by default."""


def write_dump(model: Path, tokens: int, layers: int) -> Path:
    """Writes a checkpoint; returns its folder."""
    rng = np.random.default_rng(0)
    checkpoint = model / "actives" / "iter_0540"
    for folder in (model / "samples", checkpoint):
        folder.mkdir(parents=True)
    popularity = -np.log(np.arange(1, EXPERTS + 1))
    ids = rng.zipf(1.2, tokens) % 50_000
    pq.write_table(pa.table({"token_id": ids.astype(np.int32)}), model / "samples" / "000.parquet")
    for layer in range(layers):
        order = rng.permutation(EXPERTS)
        schema = pa.schema([("scores", pa.list_(pa.float16())), ("indices", pa.list_(pa.int16()))])
        with pq.ParquetWriter(checkpoint / f"layer_{layer + 2:02}.parquet", schema) as writer:
            for first in range(0, tokens, GROUP):
                writer.write_table(_rows(rng, popularity, order, min(GROUP, tokens - first)), row_group_size=GROUP)
    return checkpoint


def _rows(rng: np.random.Generator, popularity: np.ndarray, order: np.ndarray, rows: int) -> pa.Table:
    scores, indices = np.empty((rows, TOP_K), np.float16), np.empty((rows, TOP_K), np.int16)
    for first in range(0, rows, 1 << 16):
        logits = popularity + rng.gumbel(size=(min(1 << 16, rows - first), EXPERTS)).astype(np.float32)
        chosen = np.argsort(-logits, axis=1)[:, :TOP_K]
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        own = slice(first, first + len(logits))
        scores[own], indices[own] = np.take_along_axis(p, chosen, axis=1), order[chosen]
    offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * TOP_K)
    columns = {"scores": scores, "indices": indices}
    return pa.table({name: pa.ListArray.from_arrays(offsets, pa.array(each.ravel())) for name, each in columns.items()})


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def import_here(dump: str, out: str) -> None:
    """Imports in this process and prints seconds and peak memory as JSON."""
    from collector.config import ImportConfig
    from collector.replica.importing import import_dump

    before = _peak()
    started = time.perf_counter()
    import_dump(dump, out, "flame", ImportConfig(model="synthetic"))
    print(json.dumps({"seconds": time.perf_counter() - started, "before": before, "peak": _peak()}))


def _peak() -> int:
    """Bytes; the system counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--folder", default=None, help="where dump and run are written (default: a temporary one)")
    parser.add_argument("--import-here", nargs=2, metavar=("DUMP", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.import_here:
        import_here(*arguments.import_here)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        checkpoint = write_dump(Path(folder) / "model", arguments.tokens, arguments.layers)
        command = [sys.executable, __file__, "--import-here", str(checkpoint), str(Path(folder) / "run")]
        done = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        read, written = size_of(checkpoint), size_of(Path(folder) / "run")
        print(f"{arguments.tokens:,} tokens, {arguments.layers} layers, top-{TOP_K} of {EXPERTS}")
        print(f"{arguments.tokens / done['seconds']:,.0f} tokens/s, {done['seconds']:.1f} s")
        print(f"peak memory {done['peak'] / 1e6:,.0f} MB, of which {done['before'] / 1e6:,.0f} MB before the import")
        print(f"{read / arguments.tokens:.0f} bytes/token read, {written / arguments.tokens:.0f} written")


if __name__ == "__main__":
    main()
