"""What a run is: frozen settings, each with the text that `collector collect --help` shows.

A run has two kinds of settings. Those of `DataConfig`, `ModelConfig` and `CaptureConfig` decide
what is recorded: they are part of the plan, and a resume with other values is refused. Those of
`LaunchConfig` only decide where and how fast it happens, and may change from one launch to the
next. Nothing here touches a file, a model or Ray; nothing changes after construction.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Literal

from collector import token_ids
from collector.token_ids import TokenIds

DEMO = "demo"
"""Names both the embedded model and the embedded corpus."""

Store = Literal["text", "probabilities"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Stack = Literal["encoder", "decoder"]


def _require_positive(name: str, value: float | None) -> None:
    if value is not None and value <= 0:
        raise ValueError(f"--{name.replace('_', '-')} must be positive, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which documents are read, and how they are cut into shards."""

    data: tuple[str, ...] = (DEMO,)
    """Where the documents are; several are read one after the other:
    `demo` (real sentences in 60 languages);
    a file, glob or URL (.jsonl .csv .tsv .txt, also as .gz or .zst, and .parquet; local or s3:// gs:// az:// https://);
    `hf:NAME[:CONFIG][:SPLIT]` (a dataset of the Hugging Face hub, or a local folder of data files);
    a folder written by `Dataset.save_to_disk`."""
    text_column: str = "text"
    """Column with the text.
    A number addresses a CSV/TSV column by position, from 0: the file has no header."""
    label_column: str = "label"
    """Column with the label that queries group by, as a rule the language.
    `@file` takes the file's name, up to its first dot, as the label of all its documents."""
    id_column: str = "id"
    """Column with the document's own id; without one a document is named FILE#ROW."""
    target_column: str | None = None
    """Column with the decoder's text, for encoder–decoder models with --stacks decoder.
    Default: the document itself, teacher-forced."""
    per_label: int | None = None
    """Take only the first N documents of each label (reads all labels once, while planning)."""
    limit: int | None = None
    """Take only the first N documents."""
    docs_per_shard: int = 512
    """Documents per shard: the unit of work, of commit and of repetition after a failure."""

    def __post_init__(self) -> None:
        """Refuses what no plan can be made of."""
        if not self.data:
            raise ValueError("--data needs at least one source, for example --data demo")
        for name in ("per_label", "limit", "docs_per_shard"):
            _require_positive(name, getattr(self, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which router is asked."""

    model: str = DEMO
    """A Mixture-of-Experts model: id on the Hugging Face hub, local folder, or `demo`."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    dtype: Dtype = "auto"
    """Precision of the weights and of the computation; `auto` is the checkpoint's own."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """`random` gives the untrained baseline of the same architecture."""
    seed: int = 0
    """Seed of the random weights, the same in every replica."""
    quantization: Literal["none", "nf4", "fp4", "int8-linear"] = "none"
    """`nf4` and `fp4` hold Linear layers and experts in 4 bits (bitsandbytes); routers, norms and embeddings stay.
    `int8-linear` converts Linear layers only: experts that are fused parameters stay as they are.
    A checkpoint that is quantized already stays so with `none`."""
    double_quantization: bool = True
    """Also quantize the scales of 4-bit blocks: 0.37 bits less per parameter."""
    compute_dtype: Dtype = "auto"
    """Precision in which matrices are multiplied.
    `auto` is that of the weights, but float32 on a CPU that only emulates it (several times slower)."""
    unquantized_experts: bool = False
    """Accept a quantized model whose experts are not."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptureConfig:
    """What is recorded of each token, and how documents are batched on the way."""

    layers: tuple[int, ...] | None = None
    """Router layers to record, by the model's own numbers (default: all).
    Nothing after the last of them is computed."""
    stacks: tuple[Stack, ...] | None = None
    """Which routers to record: `encoder`, `decoder` or both.
    Default: the encoder of an encoder–decoder model, whose decoder is then never run; of any other model its only
    stack."""
    max_length: int = 512
    """Longest document in tokens, and longest decoder's text. What is longer is cut there and counted."""
    tokens_per_batch: int | None = None
    """Padded tokens per forward pass, those of encoder and decoder together (default: 4096 on a CPU, 32768 on a
    GPU). A document longer than this is a batch of its own."""
    store: tuple[Store, ...] = ()
    """Also store `text` (each document's text and target) or `probabilities` (of all experts, for every token and
    layer).
    Probabilities are 4 bytes each before compression."""
    token_ids: TokenIds = "keep"
    """What is recorded of each token's id: the id; `hash`, its place in a permutation of the vocabulary that only the
    key in the environment variable COLLECTOR_TOKEN_KEY can undo; or nothing (`drop`).
    Neither protects the text: the chosen experts alone give most of it back (arXiv 2602.04105)."""

    def __post_init__(self) -> None:
        """Refuses impossible geometry."""
        _require_positive("max_length", self.max_length)
        _require_positive("tokens_per_batch", self.tokens_per_batch)
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            raise ValueError(f"--layers takes layer numbers from 0, got {self.layers}")
        if self.stacks is not None and not self.stacks:
            raise ValueError("--stacks takes encoder, decoder or both, got nothing")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """Where the parts of a model go that one device has no room for."""

    offload: Literal["none", "cpu", "disk"] = "none"
    """What may also hold weights, which then travel to the device in every pass."""
    host_memory: str | None = None
    """Host memory that weights may take, for example 20GB (default: what is free)."""
    folder: str | None = None
    """Where weights offloaded to the disk lie (default: the system's folder for temporary files)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Where the replicas run. Only the device has a part in what is recorded."""

    replicas: int | str = "auto"
    """Model replicas. `auto`: as many as the nodes hold, while nodes come and go; on CPUs one per node.
    N: up to N. MIN:MAX: up to MAX, but refused if the nodes hold fewer than MIN when the run starts.
    What the nodes do not hold is asked of the autoscaler; 0:16 waits for the first node."""
    gpus_per_replica: float = 1.0
    """GPUs per replica; a fraction lets several share one, 2 and more hold a model that one has no room for.
    Ignored on CPUs."""
    offload: Literal["none", "cpu", "disk"] = "none"
    """Where weights may lie that the replica's devices have no room for; they travel in every pass, slowly.
    `cpu` is the host memory beside a GPU, `disk` also local disk."""
    host_memory: str | None = None
    """Host memory for a replica's weights with --offload, for example 24GB (default: what is free)."""
    cpus_per_replica: int | None = None
    """CPU cores per replica (default: 1 beside a GPU; on CPUs all cores of its node, which then holds the model once;
    very small models are faster with 1)."""
    accelerator_type: str | None = None
    """Only on nodes with this accelerator, by Ray's name: A100, H100, L4 …"""
    node_labels: tuple[str, ...] = ()
    """Only on nodes whose Ray labels match all of these: KEY=VALUE, KEY='!VALUE' or KEY='in(A,B)'."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes GPUs where Ray sees some."""
    ray_address: str | None = None
    """Cluster to join (`auto`, host:port, ray://…). Default: RAY_ADDRESS, else a local Ray is started."""
    max_attempts: int = 3
    """Attempts per shard, over all launches, before it is reported as failed and left out."""
    retry_failed: bool = False
    """Try the shards again that earlier launches left out."""
    part: str | None = None
    """Where this driver begins if several work on one run, for example 2/16: with every 16th shard from the second on.
    After these it helps the others, so every part ends with the whole run complete."""
    log_format: Literal["text", "json"] = "text"
    """How messages and progress go to standard error: for people, or one JSON object per line."""

    def __post_init__(self) -> None:
        """Refuses impossible placement."""
        self.share()
        self.replica_range()
        self.labels()
        for name in ("gpus_per_replica", "cpus_per_replica", "max_attempts"):
            _require_positive(name, getattr(self, name))
        if self.gpus_per_replica > 1 and self.gpus_per_replica % 1:
            raise ValueError(
                f"--gpus-per-replica takes a fraction of one GPU or whole ones, got {self.gpus_per_replica}"
            )
        if self.host_memory is not None and self.offload == "none":
            raise ValueError("--host-memory limits what --offload cpu or --offload disk may take: give one of them")

    def share(self) -> tuple[int, int]:
        """`--part I/N` as (I - 1, N): the remainder of this driver's own shards modulo N.

        Raises:
            ValueError: it is not I/N with I from 1 to N.
        """
        if self.part is None:
            return 0, 1
        number, _, parts = self.part.partition("/")
        if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
            raise ValueError(f"--part takes I/N with I from 1 to N, for example 2/16, got {self.part!r}")
        return int(number) - 1, int(parts)

    def replica_range(self) -> tuple[int, int | None]:
        """`--replicas` as the fewest to start with and the most to ask for; None: what the nodes hold.

        Raises:
            ValueError: it is not `auto`, N or MIN:MAX.
        """
        if self.replicas == "auto":
            return 1, None
        least, given, most = str(self.replicas).partition(":")
        if not given:
            least, most = "1", least
        if not (least.isdecimal() and most.isdecimal() and int(least) <= int(most) and int(most) > 0):
            raise ValueError(f"--replicas takes auto, N or MIN:MAX, for example 0:16, got {self.replicas!r}")
        return int(least), int(most)

    def labels(self) -> dict[str, str]:
        """`--node-labels` as Ray's label selector.

        Raises:
            ValueError: one is not KEY=VALUE.
        """
        pairs = [label.partition("=") for label in self.node_labels]
        if wrong := [key for key, _, value in pairs if not (key and value)]:
            raise ValueError(f"--node-labels takes KEY=VALUE, for example market-type=spot, got {wrong[0]!r}")
        return {key: value for key, _, value in pairs}

    def spread(self, device: str) -> Spread | None:
        """How a replica's weights are spread; None if one device holds them all.

        Raises:
            ValueError: host memory is to help a CPU, which has nothing else.
        """
        if self.offload == "none" and (device == "cpu" or self.gpus_per_replica <= 1):
            return None
        if device == "cpu" and self.offload == "cpu":
            raise ValueError("--offload cpu is for weights that a GPU has no room for; on CPUs use --offload disk")
        return Spread(offload=self.offload, host_memory=self.host_memory)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run contains, with device and batch size resolved."""

    data: DataConfig
    model: ModelConfig
    capture: CaptureConfig
    device: Literal["cpu", "cuda"]
    token_key: str | None = dataclasses.field(default=None, repr=False)
    """The key of `--token-ids hash`, for the replicas; never stored."""

    def __post_init__(self) -> None:
        """Refuses to hash token ids without a key."""
        if self.capture.token_ids == "hash":
            token_ids.require_key(self.token_key)

    def to_dict(self) -> dict[str, Any]:
        """One flat dictionary of JSON values, as plan and run.json hold it."""
        sections = [dataclasses.asdict(section) for section in (self.data, self.model, self.capture)]
        flat = {key: value for section in sections for key, value in section.items()} | {"device": self.device}
        if self.token_key is not None:
            flat["token_key_fingerprint"] = token_ids.fingerprint(self.token_key)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in flat.items()}


def resolve(
    *, data: DataConfig, model: ModelConfig, capture: CaptureConfig, device: Literal["cpu", "cuda"]
) -> RunConfig:
    """Fills in what depends on the device, and the key of `--token-ids hash` from the environment.

    Raises:
        ValueError: there is no such key.
    """
    if capture.tokens_per_batch is None:
        capture = dataclasses.replace(capture, tokens_per_batch=32768 if device == "cuda" else 4096)
    key = os.environ.get(token_ids.KEY_VARIABLE) if capture.token_ids == "hash" else None
    return RunConfig(data=data, model=model, capture=capture, device=device, token_key=key)
