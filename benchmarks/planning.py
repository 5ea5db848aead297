"""Measures time and memory of planning for many documents, many files, one huge file, and many shards.

    python -m benchmarks.planning                        # 10 M documents in 1,000 files of each kind: 7 GB of disk
    python -m benchmarks.planning --documents 1000000    # a tenth of that
    python -m benchmarks.planning --parts shards         # only a plan of a million shards

Each case runs in its own process and prints its peak memory, in total and beyond what importing the
collector takes. Files were just written and are in the page cache, so the seconds are CPU-bound; a
disk or a network may take longer. Documents have 100 to 300 characters.

(documents) jsonl, csv, parquet, jsonl.gz, jsonl.zst: `make_plan` over `--documents` in `--files` files
(selected) the same jsonl files with `--per-label`, which reads every row
(small) 10,000 files of one row; (huge) all documents in one file
(shards) a plan of `--shards` shards: build, hash, write, read back, bytes per shard on disk and in memory
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gzip
import itertools
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collector.config import CaptureConfig, DataConfig, ModelConfig, RunConfig
from collector.data import plan

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

KINDS = ("jsonl", "csv", "parquet", "jsonl.gz", "jsonl.zst")
PARTS = ("documents", "selected", "small", "huge", "shards")
LABELS = 20
PIECE = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Time and memory of one case."""

    seconds: dict[str, float]
    """Seconds by step."""
    peak: int
    """Peak memory of the process, in bytes."""
    beyond: int
    """Increase of the peak during the case, in bytes."""
    notes: str


# -- files -------------------------------------------------------------------------------------------


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """Returns documents of made-up words, which compress like text."""
    random_words = random.Random(seed)
    words = ["".join(random_words.choices("etaoinshrdlu", k=random_words.randint(2, 9))) for _ in range(2000)]
    texts = [" ".join(random_words.choices(words, k=random_words.randint(16, 48))) for _ in range(count)]
    return [{"text": text, "label": f"l{i % LABELS}"} for i, text in enumerate(texts)]


def encode(kind: str, documents: Sequence[dict[str, str]]) -> bytes:
    """Encodes documents as a file of one kind."""
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(list(documents)), sink, row_group_size=1000)
        return bytes(sink.getvalue())
    if kind == "csv":
        lines = ["text,label", *(f'"{document["text"]}",{document["label"]}' for document in documents)]
    else:
        lines = [json.dumps(document) for document in documents]
    content = "".join(f"{line}\n" for line in lines).encode()
    packers: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": zstd.compress}
    return packers.get(kind.partition(".")[2], bytes)(content)


def write_files(folder: Path, kind: str, documents: int, files: int) -> str:
    """Writes files with equally many rows, cycling through ten contents; returns a glob that matches them."""
    target = folder / f"{kind}-{files}"
    target.mkdir(parents=True, exist_ok=True)
    contents = [encode(kind, rows(-(-documents // files), seed)) for seed in range(min(10, files))]
    for number, content in zip(range(files), itertools.cycle(contents), strict=False):
        (target / f"{number:06d}.{kind}").write_bytes(content)
    return f"{target}/*.{kind}"


def write_huge(folder: Path, documents: int) -> str:
    """Writes all documents to one file and returns its path."""
    content = encode("jsonl", rows(PIECE, 0))
    with (folder / "huge.jsonl").open("wb") as file:
        for _ in range(-(-documents // PIECE)):
            file.write(content)
    return str(folder / "huge.jsonl")


# -- cases -------------------------------------------------------------------------------------------


def config(spec: str, **data: Any) -> RunConfig:
    """Returns the settings of a run over one source."""
    return RunConfig(data=DataConfig(data=(spec,), **data), model=ModelConfig(), capture=CaptureConfig(), device="cpu")


def peak() -> int:
    """Returns the peak memory of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would include the parent's memory at the fork
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def timed(seconds: dict[str, float], step: str, work: Callable[[], Any]) -> Any:
    """Returns the result of the work, and records its time."""
    started = time.perf_counter()
    result = work()
    seconds[step] = time.perf_counter() - started
    return result


def plan_files(spec: str, data: dict[str, Any]) -> Cost:
    """Makes a plan and returns its cost."""
    before, seconds = peak(), dict[str, float]()
    made = timed(seconds, "plan", lambda: plan.make_plan(config(spec, **data)))
    notes = f"{made.documents:,} documents, {len(made.shards):,} shards"
    return Cost(seconds=seconds, peak=peak(), beyond=peak() - before, notes=notes)


def synthetic_shards(count: int) -> Iterator[plan.Shard]:
    """Yields shards like those of a plan over files of 100 shards each."""
    for first in range(0, count, 100):
        name = f"part-{first // 100:06d}.jsonl"
        shared = {"source": f"/data/corpus/{name}", "name": name, "kind": "jsonl", "fingerprint": f"etag:{first:064x}"}
        for i in range(min(100, count - first)):
            place = {"first_row": 512 * i, "offset": 123_457 * i}
            yield plan.Shard(shard=first + i, rows=512, keep=None, **shared, **place)  # type: ignore[arg-type]


def plan_shards(count: int) -> Cost:
    """Builds a plan of many shards, writes it and reads it back."""
    before, seconds = peak(), dict[str, float]()
    settings = config("/data/corpus/*.jsonl").to_dict()
    made = timed(seconds, "build", lambda: plan.Plan(shards=tuple(synthetic_shards(count)), config=settings))
    held = peak() - before
    written = timed(seconds, "hash", functools.partial(getattr, made, "hash"))
    data = timed(seconds, "write", made.to_parquet)
    del made
    back = timed(seconds, "read", lambda: plan.Plan.from_parquet(data))
    assert back.hash == written
    notes = f"{count:,} shards, {len(data) / count:.1f} bytes each on disk, {held / count:.0f} in memory"
    return Cost(seconds=seconds, peak=peak(), beyond=peak() - before, notes=notes)


def measure(case: str, work: Callable[..., Cost], *arguments: Any) -> None:
    """Runs a case in a fresh process, and prints a row."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        cost = pool.apply(work, arguments)
    steps = " · ".join(f"{step} {seconds:.2f} s" for step, seconds in cost.seconds.items())
    memory = f"peak {cost.peak / 1e6:.0f} MB ({cost.beyond / 1e6:.0f} MB beyond the start)"
    print(f"{case:22} {steps} · {memory} · {cost.notes}", flush=True)


def run(arguments: argparse.Namespace, folder: Path) -> None:
    """Measures all chosen parts."""
    documents, files, parts = arguments.documents, arguments.files, arguments.parts
    for kind in KINDS if "documents" in parts else ():
        measure(kind, plan_files, write_files(folder, kind, documents, files), {})
    if "selected" in parts:
        measure("jsonl, per label", plan_files, write_files(folder, "jsonl", documents, files), {"per_label": 10**9})
    if "small" in parts:
        measure("files of one row", plan_files, write_files(folder, "jsonl", 10_000, 10_000), {})
    if "huge" in parts:
        measure("one file", plan_files, write_huge(folder, documents), {})
    if "shards" in parts:
        measure("many shards", plan_shards, arguments.shards)


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--folder", type=Path, help="folder in which to keep the files (default: a temporary one)")
    arguments = parser.parse_args()
    if arguments.folder:
        run(arguments, arguments.folder)
    else:
        with tempfile.TemporaryDirectory() as folder:
            run(arguments, Path(folder))


if __name__ == "__main__":
    main()
