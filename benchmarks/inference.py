"""Measures time and memory of statistical inference for many documents, routers and experts.

    python -m benchmarks.inference                                  # 100,000 documents x 16 routers x 64 experts
    python -m benchmarks.inference --documents 10000 --routers 2    # a quick look

Counts are synthetic (20 labels, top-8, documents with their own preferences) and generated router by router, outside of
the measured time. With 1,000 resamples each it runs `intervals` of domain specialization, of all four frequencies, and
of the overlap of all pairs of labels; `specialization_test`; `split_half`. Peak memory is that of the process, counts
included.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import time
from typing import TYPE_CHECKING

import numpy as np

from collector.query.catalog import find_query
from collector.query.document_counts import STATISTICS, DocumentCounts
from collector.query.inference import specialization_test, split_half
from collector.query.inference.answers import SampledQuery
from collector.query.inference.bootstrap import router_intervals
from collector.query.inference.resampling import whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

LABELS, TOP_K, TOKENS = 20, 8, 200
QUERIES = ("domain_specialization", "selection_frequency", "language_overlap")


def synthetic(documents: int, experts: int, routers: int) -> Iterator[DocumentCounts]:
    """Yields counts of documents whose preferences vary around those of their label."""
    labels = tuple(f"l{i:02d}" for i in range(LABELS))
    label_D = np.arange(documents) % LABELS
    for layer in range(routers):
        rng = np.random.default_rng(layer)
        taste_LE = rng.dirichlet(np.full(experts, 2.0), LABELS)
        tokens_D = rng.integers(TOKENS // 2, 2 * TOKENS, documents)
        rate_DE = rng.standard_gamma(20 * taste_LE[label_D]) / 20
        picks_DE = np.minimum(rng.poisson(TOP_K * tokens_D[:, None] * rate_DE), tokens_D[:, None]).astype(np.uint32)
        yield DocumentCounts(
            stack="decoder", layer=layer, n_experts=experts, top_k=TOP_K, labels=labels, label_D=label_D,
            shard_D=np.zeros(documents, np.int64), doc_D=np.arange(documents), tokens_D=tokens_D,
            statistics_DM=rng.random((documents, len(STATISTICS))) * tokens_D[:, None], picks_DE=picks_DE,
            top1_DE=picks_DE // TOP_K, weight_sum_DE=(picks_DE / TOP_K).astype(np.float32),
        )  # fmt: skip


class Stopwatch:
    """Sums wall time and CPU time over all `with` blocks."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter() - self._started[0]
        self.cpu += time.process_time() - self._started[1]


def bootstrapped(query: str, routers: Iterable[DocumentCounts], resamples: int, watch: Stopwatch) -> int:
    """Computes intervals of a query like `intervals`; returns the number of rows."""
    asked, rows = SampledQuery(find_query(query), {}), 0
    for counts in routers:
        with watch:
            answer = asked.answer(counts, whole(counts))
            router_intervals(asked, answer, counts, resamples=resamples, seed=0)
        rows += answer.num_rows
    return rows


def one_by_one(work: Callable, routers: Iterable[DocumentCounts], watch: Stopwatch) -> int:
    """Runs a test for each router separately; returns the number of rows."""
    rows = 0
    for counts in routers:
        with watch:
            rows += work([counts]).num_rows
    return rows


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--routers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--parts", nargs="+", choices=(*QUERIES, "test", "split_half"))
    arguments = parser.parse_args()
    tests = {
        "test": lambda counts: specialization_test(counts, resamples=arguments.resamples),
        "split_half": lambda counts: split_half(counts, splits=arguments.resamples),
    }
    for part in arguments.parts or itertools.chain(QUERIES, tests):
        routers, watch = synthetic(arguments.documents, arguments.experts, arguments.routers), Stopwatch()
        if part in tests:
            rows = one_by_one(tests[part], routers, watch)
        else:
            rows = bootstrapped(part, routers, arguments.resamples, watch)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        seconds = f"{watch.wall:7.1f} s, {watch.cpu:7.1f} s of processors"
        print(f"{part:24} {seconds} · {rows:,} rows · peak {peak:.2f} GiB so far", flush=True)


if __name__ == "__main__":
    main()
