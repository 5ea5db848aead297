"""Measures time and memory of queries, against numpy and pandas, as runs grow, and with a rollup.

    python -m benchmarks.queries --parts queries floor growth rollup large

Runs are generated (`benchmarks.generated`: 16 layers, top-8 of 64, 20 languages) into a folder that is kept, and read
from a warm page cache. Every measurement runs in its own process, from opening the run to the last row, and gives wall
time, CPU time of all threads, and peak memory. Ratios are given for wall time, which a user waits for (a query uses all
cores, numpy and pandas use one), and for CPU time.

- `queries`: each query with its defaults; queries whose time grows with pairs of texts or ids run on one layer.
- `floor`: the counts of the frequency family with numpy's `bincount`, in one thread, over columns in memory; and with
  pandas as in notebooks, an exploded frame and `value_counts` per language, on one layer, multiplied by the layers.
- `growth`: some queries on runs of several sizes, with limited memory for DuckDB.
- `rollup`: the largest of these runs with a rollup: `collector rollup`, then each label-level query.
- `large`: queries that count more than label-level ones do (token ids, pairs of experts, neighbours) on the largest of
  these runs and on that of `tokens`, each in turn with its floor: numpy's counts in one thread over the same Parquet
  columns, which pyarrow reads a row group at a time. Of several repetitions the fastest is shown.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import os
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow.parquet as pq
import tyro

from benchmarks.generated import VOCABULARY, Geometry, generated
from collector.query.catalog import list_queries
from collector.query.counting.rows import BATCH
from collector.query.rollup import making
from collector.query.warehouse import committed_files, open_run
from collector.store.run_directory import RunDirectory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import pyarrow as pa
    from numpy.typing import NDArray

Part = Literal["queries", "floor", "growth", "rollup", "large"]
FREQUENCY = ("domain_specialization", "selection_frequency", "top_experts", "effective_experts", "language_overlap",
             "mutual_information", "log_odds", "reference_difference")  # fmt: skip
"""The frequency family: queries that read only counts by label."""
OF_WEIGHTS = ("selection_frequency", "top_experts")
"""Queries of the family that also need weights or the expert with the highest weight."""
GROWING = ("domain_specialization", "selection_frequency", "router_entropy", "router_entropy_quantiles")
ONE_LAYER = {name: {"layer": 0} for name in ("routing_divergence", "expert_profile",
                                            "conditional_mutual_information")}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure what queries cost."""

    parts: tuple[Part, ...] = ("queries", "floor")
    """What to measure."""
    folder: Path = Path("runs/generated")
    """Folder of the generated runs; missing ones are created."""
    tokens: int = 1_000_000
    """Tokens of the run for `queries` and `floor`."""
    growth: tuple[int, ...] = (100_000, 1_000_000, 10_000_000)
    """Tokens of the runs for `growth`; `rollup` uses the last one."""
    growing: tuple[str, ...] = GROWING
    """Queries for `growth`."""
    repeats: int = 3
    """Repetitions for `large`."""
    memory_limit: str = "4GB"
    """Memory limit of DuckDB for `growth`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Result of one measurement."""

    seconds: float
    cpu: float
    """CPU seconds of all threads."""
    megabytes: float
    """Peak memory of the process."""
    rows: int

    def cells(self) -> str:
        """Returns cells of a Markdown table."""
        return f"{self.seconds:.2f} | {self.cpu:.2f} | {self.megabytes:,.0f}"


def apart(work: Callable[..., int], *arguments: object) -> Cost:
    """Measures a function that returns a number of rows, in its own process."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measured, work, *arguments).result()


def _measured(work: Callable[..., int], *arguments: object) -> Cost:
    started, before = time.perf_counter(), _cpu()
    rows = work(*arguments)
    return Cost(seconds=time.perf_counter() - started, cpu=_cpu() - before, megabytes=_peak(), rows=rows)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _peak() -> float:
    """Returns peak megabytes of this program alone; getrusage would include the process before exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def run_query(root: str, name: str, params: dict[str, object], memory_limit: str | None = None, *, rollup: bool) -> int:
    """Opens a run, runs a query, and returns the number of rows."""
    run = open_run(root, rollup=rollup, memory_limit=memory_limit)
    return run.query(name, **params).to_arrow_table().num_rows


def make_rollup(root: str) -> int:
    """Makes the rollup of a run, as `collector rollup` does."""
    making.make(RunDirectory(root))
    return 0


def read_columns(root: str) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.float32]]:
    """Returns label numbers [L, T], experts [L, T, k] and weights [L, T, k]."""
    geometry = Geometry()
    picks = ", ".join(f"{name}{i}" for name in "ew" for i in range(geometry.top_k))
    statement = f"select substr(label, 6)::integer as language, {picks} from routing where layer = $layer"
    cursor = open_run(root).cursor()
    layers = [cursor.execute(statement, {"layer": layer}).fetchnumpy() for layer in range(geometry.layers)]
    experts, weights = (
        np.stack([np.stack([one[f"{name}{i}"] for i in range(geometry.top_k)], 1) for one in layers]) for name in "ew"
    )
    return np.stack([one["language"] for one in layers]).astype(np.int64), experts, weights


def floor(root: str) -> dict[str, float]:
    """Returns the CPU seconds of numpy for picks alone, and for picks, top-1 and weights."""
    languages_lt, experts_ltk, weights_ltk = read_columns(root)
    size = Geometry().languages * Geometry().experts
    seconds = {"picks": 0.0, "everything": 0.0}
    for languages_t, experts_tk, weights_tk in zip(languages_lt, experts_ltk, weights_ltk, strict=True):
        started = time.process_time()
        cell_tk = languages_t[:, None] * Geometry().experts + experts_tk
        np.bincount(cell_tk.ravel(), minlength=size)
        picked = time.process_time()
        first_t = weights_tk.argmax(1)
        np.bincount(cell_tk[np.arange(len(cell_tk)), first_t], minlength=size)
        np.bincount(cell_tk.ravel(), weights_tk.ravel(), minlength=size)
        seconds["picks"] += picked - started
        seconds["everything"] += time.process_time() - started
    return seconds


def pandas_seconds(root: str) -> float:
    """Returns the CPU seconds of pandas for one layer: explode the lists of experts, then value_counts by language."""
    import pandas as pd

    languages_lt, experts_ltk, _ = read_columns(root)
    frame = pd.DataFrame({"language": languages_lt[0], "expert": [row.tolist() for row in experts_ltk[0]]})
    started = time.process_time()
    exploded = frame.explode("expert")
    for language in range(Geometry().languages):
        exploded[exploded.language == language].expert.value_counts()
    return time.process_time() - started


def in_process(work: Callable[[str], object], root: str) -> object:
    """Runs a function in its own process and returns its result."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, root).result()


def measure_queries(bench: Bench) -> None:
    """Prints the cost of each query."""
    root = generated(bench.folder, bench.tokens)
    print("\n| query | seconds | CPU s | peak MB | rows |\n|---|---|---|---|---|")
    for query in list_queries():
        params = ONE_LAYER.get(query.name, {})
        cost = apart(run_rows, root, query.name, params)
        shown = query.name + (" (one layer)" if params else "")
        print(f"| `{shown}` | {cost.cells()} | {cost.rows:,} |", flush=True)


def run_rows(root: str, name: str, params: dict[str, object]) -> int:
    """Runs a query without a rollup."""
    return run_query(root, name, params, rollup=False)


def measure_floor(bench: Bench) -> None:
    """Prints the cost of counting with numpy and pandas, and of queries relative to them."""
    root = generated(bench.folder, bench.tokens)
    seconds = in_process(floor, root)
    slow = in_process(pandas_seconds, root)
    assert isinstance(seconds, dict)
    assert isinstance(slow, float)
    print("\n| counts | CPU s |\n|---|---|")
    print(f"| numpy `bincount`, picks | {seconds['picks']:.2f} |")
    print(f"| numpy `bincount`, picks, top-1 and weights | {seconds['everything']:.2f} |")
    layers = Geometry().layers
    print(f"| pandas, picks, one layer × {layers} | {slow * layers:.0f} |")
    heads = ("query", "seconds", "CPU s", "peak MB", "numpy's", "numpy's CPU", "faster than pandas")
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name in FREQUENCY:
        cost = apart(run_rows, root, name, {})
        least = seconds["everything" if name in OF_WEIGHTS else "picks"]
        ratios = f"{cost.seconds / least:.1f} | {cost.cpu / least:.1f} | {slow * layers / cost.seconds:.0f}"
        print(f"| `{name}` | {cost.cells()} | {ratios} |", flush=True)


def run_limited(root: str, name: str, memory_limit: str) -> int:
    """Runs a query without a rollup, in limited memory."""
    return run_query(root, name, {}, memory_limit, rollup=False)


def measure_growth(bench: Bench) -> None:
    """Prints the cost of some queries at several sizes."""
    print(f"\nDuckDB limited to {bench.memory_limit}.\n")
    print("| tokens | query | seconds | CPU s | peak MB | CPU s per million |\n|---|---|---|---|---|---|")
    for tokens in bench.growth:
        root = generated(bench.folder, tokens)
        for name in bench.growing:
            cost = apart(run_limited, root, name, bench.memory_limit)
            print(f"| {tokens:,} | `{name}` | {cost.cells()} | {cost.cpu / tokens * 1e6:.2f} |", flush=True)


def run_rolled_up(root: str, name: str) -> int:
    """Runs a query with the rollup."""
    return run_query(root, name, {}, rollup=True)


def measure_rollup(bench: Bench) -> None:
    """Prints the cost of making a rollup, and of queries that use it."""
    tokens = bench.growth[-1]
    root = generated(bench.folder, tokens)
    print(f"\n| {tokens:,} tokens | seconds | CPU s | peak MB |\n|---|---|---|---|")
    if not list(Path(root).glob("rollup/assignments-*")):
        print(f"| `collector rollup` | {apart(make_rollup, root).cells()} |", flush=True)
    for name in (*FREQUENCY, "router_entropy", "dropped_tokens", "load_balance"):
        print(f"| `{name}` | {apart(run_rolled_up, root, name).cells()} |", flush=True)


def row_groups(root: str, columns: Sequence[str]) -> Iterator[tuple[pa.Table, int, list[NDArray]]]:
    """Yields the shard's tokens, the layer, and columns of `routing`, [T] each, of every row group.

    A row group of a generated run holds a router's decisions about the tokens of a shard.
    """
    for path, tokens_path in zip(committed_files(root, "routing"), committed_files(root, "tokens"), strict=True):
        tokens = pq.read_table(tokens_path, columns=["doc", "token_id"], use_threads=False)
        file = pq.ParquetFile(path)
        for layer in range(file.num_row_groups):
            yield tokens, layer, arrays(file.read_row_group(layer, columns=[*columns], use_threads=False))


def arrays(table: pa.Table) -> list[NDArray]:
    """Returns the columns of a table without nulls."""
    return [np.from_dlpack(column.combine_chunks()) for column in table.columns]


def picks(name: str) -> list[str]:
    """Returns the columns of experts, e, or weights, w."""
    return [f"{name}{i}" for i in range(Geometry().top_k)]


def floor_of_ids(root: str, *, top1: bool) -> int:
    """Counts token ids by expert, and by the expert with the highest weight."""
    size = (Geometry().layers, VOCABULARY * Geometry().experts)
    counts = np.zeros((1 + top1, *size), np.uint32)
    for tokens, layer, columns in row_groups(root, picks("e") + (picks("w") if top1 else [])):
        (ids_t,) = arrays(tokens.select(["token_id"]))
        start_t = ids_t.astype(np.int64) * Geometry().experts
        experts_kt, weights_kt = columns[: Geometry().top_k], columns[Geometry().top_k :]
        for expert_t in experts_kt:
            np.add.at(counts[0, layer], start_t + expert_t, np.uint32(1))
        if top1:
            first_t = np.stack(experts_kt)[np.stack(weights_kt).argmax(0), np.arange(len(start_t))]
            np.add.at(counts[1, layer], start_t + first_t, np.uint32(1))
    return int(np.count_nonzero(counts[0]))


def floor_of_ids_alone(root: str) -> int:
    """Counts token ids by expert."""
    return floor_of_ids(root, top1=False)


def floor_of_ids_and_weights(root: str) -> int:
    """Counts token ids by expert, and by the expert with the highest weight."""
    return floor_of_ids(root, top1=True)


def floor_of_pairs(root: str) -> int:
    """Counts pairs of experts."""
    experts = Geometry().experts
    counts = np.zeros((Geometry().layers, experts**2), np.int64)
    for _, layer, columns in row_groups(root, picks("e")):
        for first in range(0, len(columns[0]), BATCH):
            expert_kt = [column[first : first + BATCH].astype(np.int64) for column in columns]
            for i, expert_t in enumerate(expert_kt):
                for other_t in expert_kt[i + 1 :]:
                    counts[layer] += np.bincount(expert_t * experts + other_t, minlength=experts**2)
    return int(np.count_nonzero(counts))


def floor_of_neighbours(root: str) -> int:
    """Compares the experts of neighbouring tokens, by document."""
    pairs = 0
    for tokens, _, columns in row_groups(root, picks("e") + picks("w")):
        (doc_t,) = arrays(tokens.select(["doc"]))
        experts_kt = np.stack(columns[: Geometry().top_k])
        first_t = experts_kt[np.stack(columns[Geometry().top_k :]).argmax(0), np.arange(len(doc_t))]
        for first in range(0, len(doc_t) - 1, BATCH):
            now, following = slice(first, min(first + BATCH, len(doc_t) - 1)), slice(first + 1, first + 1 + BATCH)
            is_pair_t = doc_t[now] == doc_t[following]
            shared_t = np.zeros(len(is_pair_t), np.uint8)
            for expert_t in experts_kt:
                for other_t in experts_kt:
                    shared_t += expert_t[now] == other_t[following]
            doc_p = doc_t[now][is_pair_t]
            for value_t in (shared_t, shared_t > 0, first_t[now] == first_t[following]):
                np.bincount(doc_p, value_t[is_pair_t])
            pairs += len(doc_p)
    return pairs


LARGE = {
    "expert_tokens": floor_of_ids_alone, "vocabulary_specialization": floor_of_ids_and_weights,
    "expert_token_overlap": floor_of_ids_alone, "coactivation": floor_of_pairs, "repetition": floor_of_neighbours,
}  # fmt: skip
"""Query -> its floor."""


def measure_large(bench: Bench) -> None:
    """Prints the cost of queries that count more than label-level ones do, and of their floors."""
    heads = ("tokens", "query", "seconds", "CPU s", "peak MB", "floor's seconds", "CPU s", "times", "times in CPU s")
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for tokens in dict.fromkeys((bench.tokens, bench.growth[-1])):
        root = generated(bench.folder, tokens)
        for name, counted in LARGE.items():
            pairs = [(apart(run_rows, root, name, {}), apart(counted, root)) for _ in range(bench.repeats)]
            cost, least = (min(each, key=lambda one: one.cpu) for each in zip(*pairs, strict=True))
            floor_cells = f"{least.seconds:.2f} | {least.cpu:.2f}"
            ratios = f"{cost.seconds / least.seconds:.1f} | {cost.cpu / least.cpu:.1f}"
            print(f"| {tokens:,} | `{name}` | {cost.cells()} | {floor_cells} | {ratios} |", flush=True)


def main(bench: Bench) -> None:
    """Measures the chosen parts."""
    print(f"load average when it began: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    measures = {
        "queries": measure_queries, "floor": measure_floor, "growth": measure_growth, "rollup": measure_rollup,
        "large": measure_large,
    }  # fmt: skip
    for part in bench.parts:
        measures[part](bench)


if __name__ == "__main__":
    main(tyro.cli(Bench))
