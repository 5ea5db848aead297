"""Settings of a run, as frozen dataclasses whose docstrings are the text of `collector collect --help`.

`DataConfig`, `ModelConfig` and `CaptureConfig` decide what is recorded: they are part of the plan,
and a resume with other values is refused. `LaunchConfig` only decides where and how fast the run
executes, and may change from one launch to the next. This module touches no file, no model and no
Ray; nothing changes after construction.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import TYPE_CHECKING, Any, Literal

from collector import token_ids
from collector.token_ids import TokenIds

if TYPE_CHECKING:
    from collections.abc import Mapping

DEMO = "demo"
"""Name of both the embedded model and the embedded corpus."""

Store = Literal["text", "probabilities", "logits", "token_effects"]
Record = Literal["routing", "outputs", "loss", "similarity", "vocabulary", "effects"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Stack = Literal["encoder", "decoder"]
DumpKind = Literal["sglang", "vllm", "flame"]


def _require_positive(name: str, value: float | None) -> None:
    if value is not None and value <= 0:
        raise ValueError(f"--{name.replace('_', '-')} must be positive, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which documents are read, and how they are cut into shards."""

    data: tuple[str, ...] = (DEMO,)
    """Documents to read. Several sources are read one after the other; each is one of:
    `demo` (real sentences in 60 languages);
    a file, folder, glob or URL (.jsonl .json .csv .tsv .txt, also as .gz or .zst, .parquet, .arrow;
    local or s3:// gs:// az:// https://);
    `hf:NAME[:CONFIG][:SPLIT]` (a dataset of the Hugging Face hub, or a local folder of data files);
    a folder written by `Dataset.save_to_disk`."""
    text_column: str = "text"
    """Column with the text; `metadata.text` finds one inside another.
    A column of conversations (`messages`) is put into words by the model's chat template.
    A column of token ids (`input_ids`) is taken as it is.
    Of a wide file each text column gives documents of its own: `sentence_*`, `translation.*` or `en,ko,de`.
    Give a number, from 0, to address a CSV or TSV column by position in a file without a header."""
    label_column: str = "label"
    """Column with the label that queries group by, usually the language; a list gives a document several labels.
    `{lang}_{script}` puts a label together from columns.
    Of the file's path, `@file` takes the name up to its first dot, `@folder` the folder's name, `@folder:2` that of the
    folder above it, `@path:REGEX` the first group that is found. Folders called KEY=VALUE are columns.
    The texts of a wide file are labelled by their columns (`@column`)."""
    id_column: str = "id"
    """Column with the document's own id. Without such a column the id is FILE#ROW."""
    parallel_column: str = "parallel_id"
    """Column with the id that translations of the same text share. Of a wide file that is the row."""
    spans_column: str | None = None
    """Column with labelled parts of the text: a list of `start`, `end` (in characters) and `label`.
    `--by span` then groups tokens by the part that they lie in. Conversations have their roles as spans."""
    target_column: str | None = None
    """Column with the decoder's text, for encoder–decoder models with --stacks decoder.
    By default the decoder is teacher-forced with the document itself."""
    per_label: int | None = None
    """Take only the first N documents of each label. Planning then reads the label of every row once."""
    limit: int | None = None
    """Take only the first N documents."""
    docs_per_shard: int = 512
    """Documents per shard. A shard is processed, committed and, after a failure, repeated as a whole."""

    def __post_init__(self) -> None:
        """Rejects settings from which no plan can be made."""
        if not self.data:
            raise ValueError("--data needs at least one source, for example --data demo")
        for name in ("per_label", "limit", "docs_per_shard"):
            _require_positive(name, getattr(self, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is run, and in what precision."""

    model: str = DEMO
    """A Mixture-of-Experts model: its id on the Hugging Face hub, a local folder, or `demo`."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    dtype: Dtype = "auto"
    """Precision of the weights and of the computation. `auto` uses the checkpoint's own."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """`random` initializes the same architecture at random, as an untrained baseline."""
    seed: int = 0
    """Seed of the random weights, the same in every replica, and of the tokens that --generate draws."""
    quantization: Literal["none", "nf4", "fp4", "int8-linear"] = "none"
    """`nf4` and `fp4` store Linear layers and experts in 4 bits (bitsandbytes), but not routers, norms and embeddings.
    `int8-linear` converts Linear layers only: experts that are fused parameters keep their precision.
    `none` converts nothing; a checkpoint that is already quantized stays quantized."""
    double_quantization: bool = True
    """Also quantize the scales of the 4-bit blocks, which saves 0.37 bits per parameter."""
    compute_dtype: Dtype = "auto"
    """Precision of matrix multiplications.
    `auto` takes that of the weights, or float32 on a CPU that only emulates it (emulation is several times slower)."""
    compile: bool = False
    """Fuse the norms, rotary embeddings, activations and sums of the model's layers with torch.compile, for GPUs.
    Each replica compiles during its first batch. Routing differs from that of the plain model where rounding decides.
    Experimental: its present form has not been measured on a GPU."""
    unquantized_experts: bool = False
    """Accept a quantized model whose experts are not quantized."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptureConfig:
    """What is recorded of each token, and how documents are batched."""

    layers: tuple[int, ...] | None = None
    """Router layers to record, numbered as in the model (default: all).
    The forward pass stops after the last of them."""
    stacks: tuple[Stack, ...] | None = None
    """Which routers to record: `encoder`, `decoder` or both.
    By default only the encoder of an encoder–decoder model is recorded, and its decoder never runs.
    Other models have a single stack."""
    max_length: int = 512
    """Longest document, and longest decoder text, in tokens. Longer texts are truncated and counted."""
    tokens_per_batch: int | None = None
    """Padded tokens per forward pass, encoder and decoder together (default: 4096 on a CPU, 32768 on a GPU).
    A document longer than this is a batch of its own. Lower it if the device runs out of memory."""
    record: tuple[Record, ...] = ("routing",)
    """What to record: `routing`, always; `outputs`, what the chosen experts put out and contribute;
    `loss`, how surprised the model is by each token; `similarity`, how alike the outputs of all experts are;
    `vocabulary`, which tokens the outputs of the chosen experts promote; `effects`, what the edits of --arms do."""
    arms: tuple[str, ...] = ()
    """Edits of the routing whose effects are recorded, each set with a name:
    'no-31: layer=4 expert=31 operation=drop; layer=5 expert=2 operation=scale value=0.5'.
    Operations are those of `collector trace --edit`. Every arm is one more forward pass of each batch."""
    generate: int | None = None
    """Have the model write on from each document, up to N tokens, and record their routing like that of the others.
    Documents are prompts then; of a conversation the model writes the assistant's next turn.
    `--by phase` tells the prompts from the answers."""
    temperature: float = 0.0
    """How random the tokens are that --generate writes. 0 takes the most probable one.
    Draws depend on the document and --seed alone."""
    top_p: float = 1.0
    """Draw from the most probable tokens that have this probability together."""
    stop_at: tuple[str, ...] = ()
    """End an answer also at a token that contains one of these texts. The model's own end tokens always end it."""
    sample_tokens: int = 512
    """Tokens of each shard that `--record similarity` sends through all experts, and that `vocabulary` reads."""
    store: tuple[Store, ...] = ()
    """Also store `text` (each document's text and target), `probabilities` or `logits` (of all experts), or
    `token_effects` (what --arms do to the prediction of each token, 9 bytes per token and arm before compression).
    Probabilities and logits are stored for every token and layer, at 4 bytes an expert before compression; logits give
    both."""
    token_ids: TokenIds = "keep"
    """How token ids are recorded: `keep` stores them, `drop` leaves them out, `hash` permutes the vocabulary.
    `hash` reads its key from the environment variable COLLECTOR_TOKEN_KEY; without the key nobody can recover the ids.
    Neither protects the text: most of it can be recovered from the chosen experts alone (arXiv 2602.04105)."""

    def __post_init__(self) -> None:
        """Rejects impossible layers, stacks and sizes."""
        _require_positive("max_length", self.max_length)
        _require_positive("tokens_per_batch", self.tokens_per_batch)
        _require_positive("sample_tokens", self.sample_tokens)
        self._check_generation()
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            raise ValueError(f"--layers takes layer numbers from 0, got {self.layers}")
        if self.stacks is not None and not self.stacks:
            raise ValueError("--stacks takes encoder, decoder or both, got nothing")
        if ("effects" in self.record) != bool(self.arms):
            raise ValueError("--record effects and --arms go together: the arms are what the effects are of")
        if "token_effects" in self.store and not self.arms:
            raise ValueError("--store token_effects takes --record effects and --arms")
        if "vocabulary" in self.record and self.token_ids != "keep":
            raise ValueError(
                f"--record vocabulary names the tokens that experts promote, which --token-ids {self.token_ids} hides: "
                "leave out one of the two"
            )

    def _check_generation(self) -> None:
        _require_positive("generate", self.generate)
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"--temperature takes 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p takes a probability above 0, up to 1, got {self.top_p}")
        if self.generate is None and (self.temperature or self.top_p < 1 or self.stop_at):
            raise ValueError("--temperature, --top-p and --stop-at say how --generate writes: give --generate, too")
        if self.top_p < 1 and not self.temperature:
            raise ValueError("--top-p chooses among draws: give --temperature, for example 1")
        if self.generate is not None and (others := set(self.record) - {"routing", "outputs"}):
            raise ValueError(
                f"--generate records routing and outputs while the model writes, not {' and '.join(sorted(others))}: "
                "store the answers with --store text, and collect these texts with what you want to --record"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """How a model that is too large for one device is spread over devices, host memory and disk."""

    offload: Literal["none", "cpu", "disk"] = "none"
    """Where weights beyond the devices' memory are kept; they are copied to the device in every forward pass."""
    host_memory: str | None = None
    """Host memory that weights may take, for example 20GB (default: all that is free)."""
    folder: str | None = None
    """Folder for weights offloaded to disk (default: the system's folder for temporary files)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Where and how the replicas run. Of these settings only the device affects what is recorded."""

    replicas: int | str = "auto"
    """Number of model replicas. `auto`: as many as fit, while nodes come and go; on CPUs one per node.
    N: up to N. MIN:MAX: up to MAX, and an error if fewer than MIN fit when the run starts.
    Replicas that do not fit are requested from the autoscaler; 0:16 waits for the first node."""
    gpus_per_replica: float = 1.0
    """GPUs per replica. A fraction lets several replicas share a GPU; 2 or more split a model too large for one.
    Ignored on CPUs."""
    offload: Literal["none", "cpu", "disk"] = "none"
    """Where to keep weights that do not fit on the replica's devices. Copying them in every forward pass is slow.
    `cpu` uses the host memory beside a GPU, `disk` also local disk."""
    host_memory: str | None = None
    """Host memory for a replica's weights with --offload, for example 24GB (default: all that is free)."""
    cpus_per_replica: int | None = None
    """CPU cores per replica (default: 1 beside a GPU; on CPUs all cores of the node, which then loads the model once).
    Very small models are faster with 1."""
    accelerator_type: str | None = None
    """Use only nodes with this accelerator, by Ray's name: A100, H100, L4 …"""
    node_labels: tuple[str, ...] = ()
    """Use only nodes whose Ray labels match all of these: KEY=VALUE, KEY='!VALUE' or KEY='in(A,B)'."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the replicas. `auto` takes GPUs if Ray sees any."""
    ray_address: str | None = None
    """Cluster to join (`auto`, host:port, ray://…). Default: RAY_ADDRESS; without it a local Ray is started."""
    max_attempts: int = 3
    """Attempts per shard, over all launches, before it is reported as failed and left out."""
    retry_failed: bool = False
    """Retry the shards that earlier launches left out."""
    max_rejected: float = 0.5
    """Share of the rows, from 0 to 1, that may become no document. More end the run with status 2, as does a run
    without any document. What was collected stays, and a higher share goes on with it."""
    part: str | None = None
    """This driver's share when several work on one run: 2/16 starts with every 16th shard from the second on.
    When its share is done, the driver helps the others, so every part ends with the whole run complete."""
    log_format: Literal["text", "json"] = "text"
    """Format of messages and progress on standard error: text for people, or one JSON object per line."""

    def __post_init__(self) -> None:
        """Rejects impossible placement."""
        self.share()
        self.replica_range()
        self.labels()
        for name in ("gpus_per_replica", "cpus_per_replica", "max_attempts"):
            _require_positive(name, getattr(self, name))
        if not 0 <= self.max_rejected <= 1:
            raise ValueError(f"--max-rejected takes a share from 0 to 1, got {self.max_rejected}")
        if self.gpus_per_replica > 1 and self.gpus_per_replica % 1:
            raise ValueError(
                f"--gpus-per-replica takes a fraction of one GPU or whole ones, got {self.gpus_per_replica}"
            )
        if self.host_memory is not None and self.offload == "none":
            raise ValueError("--host-memory limits what --offload cpu or --offload disk may take: give one of them")

    def share(self) -> tuple[int, int]:
        """Returns `--part I/N` as (I - 1, N): this driver's own shards are those with remainder I - 1 modulo N.

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
        """Returns `--replicas` as a minimum and a maximum; a maximum of None means as many as the nodes hold.

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
        """Returns `--node-labels` as Ray's label selector.

        Raises:
            ValueError: one is not KEY=VALUE.
        """
        pairs = [label.partition("=") for label in self.node_labels]
        if wrong := [key for key, _, value in pairs if not (key and value)]:
            raise ValueError(f"--node-labels takes KEY=VALUE, for example market-type=spot, got {wrong[0]!r}")
        return {key: value for key, _, value in pairs}

    def spread(self, device: str) -> Spread | None:
        """Returns how a replica's weights are spread, or None if one device holds them all.

        Raises:
            ValueError: `--offload cpu` on a CPU, whose weights are in host memory anyway.
        """
        if self.offload == "none" and (device == "cpu" or self.gpus_per_replica <= 1):
            return None
        if device == "cpu" and self.offload == "cpu":
            raise ValueError("--offload cpu is for weights that a GPU has no room for; on CPUs use --offload disk")
        return Spread(offload=self.offload, host_memory=self.host_memory)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """What is known of a dump of another program, and how it becomes a run."""

    model: str
    """Name of the model, for people: dumps do not tell it."""
    experts: int | None = None
    """Experts that the model's routers choose from, which responses do not tell. The recorder's map does; of flame it
    is 64."""
    top_k: int | None = None
    """Experts that a router chooses per token, for returned routing of SGLang, which is a flat list."""
    tokenizer: str | None = None
    """The model's tokenizer: a model on the Hugging Face hub, or a local folder. Adds how tokens are spelled, and which
    are special; without it none counts as special."""
    label_column: str | None = None
    """Field of a response with the label that queries group by; also `{lang}_{script}`, `@file` or `@folder`, as for
    collect. By default `label`, where there is one. Documents without a label are `unlabelled`."""
    id_column: str = "id"
    """Field of a response with the document's own id. Without it the engine's id of the request, or FILE#ROW."""
    tokens_per_document: int = 2048
    """Tokens of a document of flame, which does not record where documents end."""
    decode: Literal["leave-out", "alone"] = "leave-out"
    """Tokens that SGLang's recorder saw in decoding, of which it is not known to which request they belong.
    `alone` makes each a document of one token. Intervals and tests then take them for independent, which they are
    not."""
    lost: Literal["refuse", "drop"] = "refuse"
    """Tokens without routing: an expert twice, as in the rows of zeros that engines return for tokens that they lost.
    `drop` leaves them out; the other tokens keep their positions."""
    docs_per_shard: int | None = None
    """Documents per shard (default: 512, of flame as many as have 131,072 tokens). A shard is committed as a whole."""

    def __post_init__(self) -> None:
        """Rejects sizes that are none."""
        for name in ("experts", "top_k", "tokens_per_document", "docs_per_shard"):
            _require_positive(name, getattr(self, name))
        if self.experts is not None and self.experts > 1 << 15:
            raise ValueError(f"--experts takes a number up to 32768, got {self.experts}")

    def to_dict(self) -> dict[str, Any]:
        """Returns what decides the content of the run, as JSON values.

        `lost` does not: what was committed under `refuse` has no such token.
        """
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "lost"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings that decide what a run contains, with device and batch size resolved."""

    data: DataConfig
    model: ModelConfig
    capture: CaptureConfig
    device: Literal["cpu", "cuda"]
    token_key: str | None = dataclasses.field(default=None, repr=False)
    """The key of `--token-ids hash`, for the replicas; never stored."""

    def __post_init__(self) -> None:
        """Rejects `--token-ids hash` without a key."""
        if self.capture.token_ids == "hash":
            token_ids.require_key(self.token_key)

    def to_dict(self) -> dict[str, Any]:
        """Returns one flat dictionary of JSON values, as the plan and run.json store it."""
        sections = [dataclasses.asdict(section) for section in (self.data, self.model, self.capture)]
        flat = {key: value for section in sections for key, value in section.items()} | {"device": self.device}
        if self.token_key is not None:
            flat["token_key_fingerprint"] = token_ids.fingerprint(self.token_key)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in flat.items()}


def section(kind: type[Any], flat: Mapping[str, Any], **changed: Any) -> Any:
    """Builds one section of a configuration from a dictionary of `RunConfig.to_dict`.

    Args:
        kind: `DataConfig`, `ModelConfig` or `CaptureConfig`.
        flat: the dictionary; what it lacks gets its default.
        changed: values to take instead.
    """
    fields = {field.name for field in dataclasses.fields(kind)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in flat.items() if name in fields}
    return kind(**given | changed)


def resolve(
    *, data: DataConfig, model: ModelConfig, capture: CaptureConfig, device: Literal["cpu", "cuda"]
) -> RunConfig:
    """Fills in the settings that depend on the device, and takes the key of `--token-ids hash` from the environment.

    Raises:
        ValueError: the environment has no usable key.
    """
    if capture.tokens_per_batch is None:
        capture = dataclasses.replace(capture, tokens_per_batch=32768 if device == "cuda" else 4096)
    key = os.environ.get(token_ids.KEY_VARIABLE) if capture.token_ids == "hash" else None
    return RunConfig(data=data, model=model, capture=capture, device=device, token_key=key)
