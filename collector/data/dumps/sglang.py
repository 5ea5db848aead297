"""Reads what SGLang dumps: files of its expert distribution recorder, and routing that it returned with responses.

The recorder's mode `per_token` writes `expert_distribution_recorder_{time}_{rank}.pt`: a record per forward pass, with
the ids of the physical experts that each token went to. Its requests have no ids. What a pass extends
(`extend_seq_lens`: a prompt, or what of it was neither cached nor in an earlier chunk) is a document, at the positions
that it has in its request. A pass without them decodes: of its tokens it is not known which request they belong to, nor
what came before them, so they are left out, or each is a document.

Returned routing (`return_routed_experts`) is base64 of int32, flat. A line is a request's ids and its response:

    {"input_ids": [...], "output_ids": [...], "meta_info": {"routed_experts": "…", "routed_experts_start_len": 0}}

A .pt file is a pickle; only tensors and plain values are read from it.
"""

from __future__ import annotations

import functools
import itertools
import pickle
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from collector.data.dumps.base import IDS_ONLY, NO_PROMPTS, Cut, Dump, Dumped, Router
from collector.data.dumps.responses import (
    DOCS_PER_SHARD,
    NO_ROUTING,
    OTHER_SHAPE,
    Responses,
    Sequence,
    bytes_of,
    ids_of,
    of_sequence,
)
from collector.data.sources import BadRow, files
from collector.data.sources.labels import UnusableError
from collector.data.sources.listing import list_files

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from collector.config import ImportConfig
    from collector.data.plan import Shard

_NAME = "expert_distribution_recorder_*.pt"


def is_recorder(location: str) -> bool:
    """Whether a location denotes files of the recorder: a .pt file, a glob of them, or a folder that has some."""
    return location.endswith(".pt") or any(Path(location).glob(_NAME))


class SglangResponses(Responses):
    """Responses with routing."""

    def __init__(self, location: str, config: ImportConfig) -> None:
        super().__init__(location, config)
        if config.top_k is None:
            raise ValueError(
                "--top-k: routing that SGLang returns is a flat list of ids, which does not tell how many experts a "
                "token has; give the number that the model's routers choose"
            )
        self.top_k = config.top_k

    def outputs(self, record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """See `Responses.outputs`: a response has one answer."""
        return [record]

    def sequence(self, record: Mapping[str, Any], output: Mapping[str, Any]) -> Sequence:
        """See `Responses.sequence`."""
        meta = output.get("meta_info")
        if not isinstance(meta, dict):
            raise UnusableError(NO_ROUTING)
        prompt = ids_of(record.get("input_ids"))
        token_ids = np.concatenate([prompt, ids_of(output.get("output_ids"))])
        first = meta.get("routed_experts_start_len", record.get("routed_experts_start_len", 0)) or 0
        flat = bytes_of(meta.get("routed_experts"))
        rows = len(token_ids) - 1 - first if isinstance(first, int) and first >= 0 else 0
        if rows < 1 or not flat or len(flat) % (4 * rows * self.top_k):
            raise UnusableError(OTHER_SHAPE)
        experts_tlk = np.frombuffer(flat, "<i4").reshape(rows, -1, self.top_k)
        return of_sequence(token_ids, len(prompt), first, experts_tlk)

    def notes(self) -> list[str]:
        """See `Dump.notes`."""
        return [
            f"read as {self.depth} layers of {self.top_k} experts a token: --top-k is wrong if the model has others"
        ]

    def own_id(self, record: Mapping[str, Any]) -> object:
        """See `Responses.own_id`."""
        return record["meta_info"].get("id")


class Recorder(Dump):
    """Files of the recorder, one per rank; each rank's tokens are its own."""

    lacks: ClassVar[tuple[str, ...]] = (*IDS_ONLY, NO_PROMPTS)

    def __init__(self, location: str, config: ImportConfig) -> None:
        super().__init__(location, config)
        path = Path(location)
        self.files = (
            [str(each.absolute()) for each in sorted(path.glob(_NAME))] if path.is_dir() else list_files(location)
        )
        self.left_out = 0
        """Tokens of decoding passes that are no documents."""

    def fingerprints(self) -> dict[str, str]:
        """See `Dump.fingerprints`."""
        return {location: files.fingerprint(location) for location in self.files}

    def cut(self) -> Iterator[Cut]:
        """See `Dump.cut`."""
        every = self.config.docs_per_shard or DOCS_PER_SHARD
        for location in self.files:
            self._learn_from(location, _load(location))
            passes = [
                (len(lengths), len(_numbers(record["positions"]))) for _, record, lengths in self._passes(location)
            ]
            self.left_out += sum(tokens for documents, tokens in passes if not documents)
            count = sum(documents for documents, _ in passes)
            for first in range(0, count, every):
                yield Cut(
                    source=location, name=Path(location).name, first_row=first, rows=min(every, count - first)
                )  # fmt: skip
        if not self.routers:
            raise ValueError(f"{self.location} holds no token: the recorder was stopped before the first pass")

    def geometry(self) -> dict[str, Any]:
        """See `Dump.geometry`."""
        return super().geometry() | {"left_out": self.left_out}

    def learn(self, geometry: Mapping[str, Any]) -> None:
        """See `Dump.learn`."""
        super().learn(geometry)
        self.left_out = geometry["left_out"]

    def notes(self) -> list[str]:
        """See `Dump.notes`."""
        if not self.left_out:
            return []
        return [
            f"{self.left_out:,} tokens were decoded, and the dump does not tell of which request: left out; --decode "
            "alone makes each a document of its own"
        ]

    def read(self, shard: Shard) -> Iterator[Dumped | BadRow]:
        """See `Dump.read`."""
        dump, row = _load(shard.source), 0
        to_logical = _numbers(dump["last_physical_to_logical_map"])
        for number, record, lengths in self._passes(shard.source):
            if lengths and row + len(lengths) > shard.first_row and row < shard.first_row + shard.rows:
                pass_ = _Pass(record, f"{shard.name}, pass {number}")
                experts_tlk = self._logical(pass_, to_logical)
                starts = np.cumsum([0, *lengths])
                for place, (start, stop) in enumerate(itertools.pairwise(starts.tolist())):
                    if shard.first_row <= row + place < shard.first_row + shard.rows:
                        document = Dumped(
                            id=f"{shard.name}#{number}.{place}", source=shard.name, row=row + place,
                            token_ids=pass_.token_ids[start:stop], positions=pass_.positions[start:stop],
                            experts=experts_tlk[start:stop],
                        )  # fmt: skip
                        yield self.checked(document, shard.name)
            row += len(lengths)

    def _passes(self, location: str) -> Iterator[tuple[int, Mapping[str, Any], list[int]]]:
        """Yields the passes of a file: number, record, and the tokens of each of its documents."""
        for number, record in enumerate(_load(location)["records"]):
            lengths = record.get("extend_seq_lens")
            extended = [] if lengths is None else [int(length) for length in _numbers(lengths)]
            tokens = len(_numbers(record["positions"]))
            if not extended:
                extended = [1] * tokens if self.config.decode == "alone" else []
            elif sum(extended) != tokens or min(extended) < 1:
                raise ValueError(
                    f"{Path(location).name}, pass {number}: extend_seq_lens adds up to {sum(extended):,} tokens, and "
                    f"there are {tokens:,} positions"
                )
            yield number, record, extended

    def _learn_from(self, location: str, dump: Mapping[str, Any]) -> None:
        """Learns the routers from the first pass of a file that has tokens; all files must have the same."""
        to_logical = _numbers(dump["last_physical_to_logical_map"])
        for number, record in enumerate(dump["records"]):
            pass_ = _Pass(record, f"{Path(location).name}, pass {number}")
            chosen_lt = (pass_.experts_ltk >= 0).sum(axis=2)
            if not chosen_lt.any():
                continue
            experts = int(to_logical.max()) + 1
            if self.config.experts not in (None, experts):
                raise ValueError(
                    f"--experts {self.config.experts}: the map of {location} has {experts} logical experts"
                )
            routers = tuple(
                Router(layer=layer, n_experts=experts, top_k=int(counts.max()))
                for layer, counts in enumerate(chosen_lt)
                if counts.any()
            )
            if self.routers and self.routers != routers:
                raise ValueError(f"{location} has other routers than the files before: import it as a run of its own")
            self.depth, self.routers = len(chosen_lt), routers
            return

    def _logical(self, pass_: _Pass, to_logical: NDArray[np.integer]) -> NDArray[np.int64]:
        """[T, L, k] logical experts at the routers; -1 where a token has none.

        Raises:
            ValueError: tokens of a layer have different numbers of experts, or one is not in the map.
        """
        routed = [router.layer for router in self.routers]
        if len(pass_.experts_ltk) != self.depth or (np.delete(pass_.experts_ltk, routed, axis=0) >= 0).any():
            raise ValueError(f"{pass_.name} has other layers with experts than the first pass")
        width = max(router.top_k for router in self.routers)
        experts_tlk = np.full((len(pass_.positions), len(routed), width), -1, np.int64)
        for place, router in enumerate(self.routers):
            physical_tk = pass_.experts_ltk[router.layer]
            chosen_t = (physical_tk >= 0).sum(axis=1)
            if not np.isin(chosen_t, (0, router.top_k)).all() or (physical_tk[:, router.top_k :] >= 0).any():
                raise ValueError(
                    f"{pass_.name}: tokens of layer {router.layer} have {sorted({*chosen_t.tolist()} - {0})} experts, "
                    "and a router chooses as many for each"
                )
            map_p = to_logical[router.layer]
            ids = physical_tk[chosen_t > 0, : router.top_k]
            if ids.size and (int(ids.max()) >= len(map_p) or int(map_p[ids].min()) < 0):
                raise ValueError(
                    f"{pass_.name}: physical expert {int(ids.max())} of layer {router.layer} is not in the map, which "
                    f"has {len(map_p)} of them: experts moved while it was recorded, or the map is another server's"
                )
            experts_tlk[chosen_t > 0, place, : router.top_k] = map_p[ids]
        return experts_tlk


class _Pass:
    """The tokens of a forward pass."""

    def __init__(self, record: Mapping[str, Any], name: str) -> None:
        self.name = name
        if "topk_ids_of_layer" not in record:
            raise ValueError(
                f"{name} has counts of experts and no tokens: it was recorded in the mode per_pass; record again with "
                "--expert-distribution-recorder-mode per_token"
            )
        self.token_ids, self.positions = (_numbers(record[key]).astype(np.int64) for key in ("input_ids", "positions"))
        self.experts_ltk = _numbers(record["topk_ids_of_layer"])
        """[L, T, 8] physical experts, -1 for none."""
        tokens = len(self.positions)
        if self.experts_ltk.ndim != 3 or self.experts_ltk.shape[1] != tokens or len(self.token_ids) != tokens:
            raise ValueError(
                f"{name}: topk_ids_of_layer is {list(self.experts_ltk.shape)}, for {len(self.token_ids):,} input ids "
                f"and {tokens:,} positions"
            )


@functools.lru_cache(maxsize=1)
def _load(location: str) -> Mapping[str, Any]:
    """Reads a file of the recorder; its tensors stay on the disk until somebody asks.

    Raises:
        ValueError: it is no dump with tokens, or holds more than tensors and plain values.
    """
    import torch

    try:
        dump = torch.load(location, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(location))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(
            f"{location} is damaged, or holds more than tensors and plain values, which could run any code and is not "
            f"read: {str(error).splitlines()[0]}"
        ) from error
    if isinstance(dump, dict) and "logical_count" in dump:
        raise ValueError(
            f"{location} has counts of experts and no tokens: it was recorded in the mode stat, which SGLang's "
            "--init-expert-location takes as it is; for a run record with --expert-distribution-recorder-mode per_token"
        )
    if not isinstance(dump, dict) or not {"records", "last_physical_to_logical_map"} <= dump.keys():
        raise ValueError(f"{location} is no dump of SGLang's expert distribution recorder: it has no records and map")
    return dump


def _numbers(value: Any) -> NDArray[np.integer]:
    """Returns a tensor, or a list of numbers, as an array."""
    return np.asarray(value.numpy() if hasattr(value, "numpy") else value)
