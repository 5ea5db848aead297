"""Reads FLAME-MoE-Traces (CMU-FLAME/FLAME-MoE-Traces on the Hugging Face hub): Parquet files by checkpoint and layer.

    MODEL/samples/000.parquet …                      token_id of each token, shared by all checkpoints
    MODEL/actives/iter_0540/layer_02.parquet …       scores and indices of each token, descending

A dump is the folder of a checkpoint, `MODEL/actives/iter_0540`. Row i of a layer is row i of the samples, one file
after the other. Where documents end is not recorded: training rows were packed. Documents are blocks of
`--tokens-per-document` tokens.

Scores are the softmax over all experts, of the chosen. They are taken for the weights that the model applied, as
Megatron's router applies them if it computes the softmax before its choice and scales nothing; rounded to 16 bits.
Their sum is the top-k mass. The shared experts, which every token goes to, are not in the dump.

Guarantees: memory holds a shard's tokens and a batch of rows per file, whatever the files' row groups; files are read
once, in step, if shards are read in order.
"""

from __future__ import annotations

import bisect
import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from collector.data.dumps.base import NO_PROMPTS, Cut, Dump, Dumped, Router
from collector.data.sources import BadRow, files

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from collector.config import ImportConfig
    from collector.data.plan import Shard

EXPERTS = 64
"""Routed experts of the models of the data set."""
_TOKENS_PER_SHARD = 1 << 17
_BATCH = 1 << 16
_LAYER = re.compile(r"layer_(\d+)\.parquet")


class Flame(Dump):
    """A checkpoint of FLAME-MoE-Traces."""

    lacks: ClassVar[tuple[str, ...]] = ("entropy", "margin", "probabilities", "logits", "characters", NO_PROMPTS)

    def __init__(self, location: str, config: ImportConfig) -> None:
        super().__init__(location, config)
        folder = Path(location).absolute()
        found = {int(match[1]): path for path in folder.glob("*.parquet") if (match := _LAYER.fullmatch(path.name))}
        samples = sorted((folder.parent.parent / "samples").glob("*.parquet"))
        if not found or not samples:
            raise ValueError(
                f"{location} is no checkpoint of FLAME-MoE-Traces: name a folder like MODEL/actives/iter_0540, with "
                f"layer_*.parquet in it ({len(found)} found) and MODEL/samples/*.parquet ({len(samples)} found)"
            )
        self.folder = folder
        self._samples = _Rows(samples)
        self._layers = {layer: _Rows([found[layer]]) for layer in sorted(found)}

    def fingerprints(self) -> dict[str, str]:
        """See `Dump.fingerprints`."""
        rows = [self._samples, *self._layers.values()]
        return {str(path): files.fingerprint(str(path)) for each in rows for path in each.paths}

    def cut(self) -> Iterator[Cut]:
        """See `Dump.cut`; reads footers, and the first row of each layer."""
        tokens, each = self._samples.count, self.config.tokens_per_document
        for layer, rows in self._layers.items():
            if rows.count != tokens:
                raise ValueError(f"{rows.paths[0]} has {rows.count:,} rows, the samples have {tokens:,} tokens")
            top_k = len(rows.read(0, 1, "indices")["indices"][0]) if tokens else 0
            self.routers += (Router(layer=layer, n_experts=self.config.experts or EXPERTS, top_k=top_k),)
        if not tokens:
            raise ValueError(f"{self.folder.parent.parent / 'samples'} holds no token")
        documents = -(-tokens // each)
        every = self.config.docs_per_shard or max(1, _TOKENS_PER_SHARD // each)
        for first in range(0, documents, every):
            yield Cut(
                source=str(self.folder), name=self.folder.name, first_row=first, rows=min(every, documents - first)
            )  # fmt: skip

    def read(self, shard: Shard) -> Iterator[Dumped | BadRow]:
        """See `Dump.read`."""
        each = self.config.tokens_per_document
        start = shard.first_row * each
        count = min((shard.first_row + shard.rows) * each, self._samples.count) - start
        token_ids = self._samples.read(start, count, "token_id")["token_id"].to_numpy().astype(np.int64)
        width = max(router.top_k for router in self.routers)
        experts_tlk = np.full((count, len(self.routers), width), -1, np.int16)
        scores_tlk = np.full(experts_tlk.shape, np.nan, np.float32)
        for place, router in enumerate(self.routers):
            rows = self._layers[router.layer].read(start, count, "indices", "scores")
            where = self._layers[router.layer].paths[0]
            experts_tlk[:, place, : router.top_k] = _picks(rows["indices"], router.top_k, where)
            scores_tlk[:, place, : router.top_k] = _scores(rows["scores"], router.top_k, where)
        for number in range(shard.rows):
            own = slice(number * each, min((number + 1) * each, count))
            document = Dumped(
                id=f"{shard.name}#{shard.first_row + number}", source=shard.name, row=shard.first_row + number,
                token_ids=token_ids[own], positions=np.arange(own.stop - own.start), experts=experts_tlk[own],
                probabilities=scores_tlk[own],
            )  # fmt: skip
            yield self.checked(document, shard.name)


def _picks(column: pa.ChunkedArray, top_k: int, where: Path) -> NDArray:
    """[T, k] of a column of lists.

    Raises:
        ValueError: a list has another length.
    """
    lengths = pc.min_max(pc.list_value_length(column)).as_py()
    if column.null_count or set(lengths.values()) - {top_k}:
        raise ValueError(f"{where}: a token has {lengths['min']} to {lengths['max']} experts, the first one {top_k}")
    return pc.list_flatten(column).to_numpy().reshape(-1, top_k)


def _scores(column: pa.ChunkedArray, top_k: int, where: Path) -> NDArray[np.float32]:
    """[T, k] probabilities.

    Raises:
        ValueError: they are none.
    """
    scores_tk = _picks(column, top_k, where).astype(np.float32)
    if not (scores_tk >= 0).all() or float(scores_tk.sum(axis=1).max(initial=0)) > 1.01:  # 16 bits round
        raise ValueError(f"{where}: scores are no probabilities: negative, not numbers, or of a sum above 1")
    return scores_tk


class _Rows:
    """The rows of Parquet files one after the other; goes on where it stopped, and starts over to go elsewhere."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self._files = [self._open(path) for path in self.paths]
        groups = [(file, g) for file in self._files for g in range(file.num_row_groups)]
        self._groups = groups
        self._starts = [0, *itertools.accumulate(file.metadata.row_group(g).num_rows for file, g in groups)]
        self.count = self._starts[-1]
        self._next = -1
        self._held: list[pa.RecordBatch] = []
        self._columns: tuple[str, ...] = ()

    @staticmethod
    def _open(path: Path) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(path, pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error

    def read(self, start: int, count: int, *columns: str) -> pa.Table:
        """Returns `count` rows from `start` on.

        Raises:
            ValueError: there is no such column, or the file is damaged.
        """
        if missing := set(columns) - set(self._files[0].schema_arrow.names):
            raise ValueError(f"{self.paths[0]} has no column {missing.pop()!r}")
        if start != self._next or columns != self._columns:
            self._batches, self._held, self._columns = self._from(start, columns), [], columns
        held, rows = self._held, sum(len(batch) for batch in self._held)
        while rows < count:
            held.append(next(self._batches))
            rows += len(held[-1])
        table = pa.Table.from_batches(held)
        self._held, self._next = table.slice(count).to_batches(), start + count
        return table.slice(0, count)

    def _from(self, start: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yields the batches from a row on."""
        group = bisect.bisect_right(self._starts, start) - 1
        skipped = start - self._starts[group]
        try:
            for file, g in self._groups[group:]:
                for batch in file.iter_batches(_BATCH, row_groups=[g], columns=list(columns), use_threads=False):
                    if skipped >= len(batch):
                        skipped -= len(batch)
                        continue
                    yield batch.slice(skipped)
                    skipped = 0
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.paths[0]} is damaged: {str(error).splitlines()[0]}") from error
