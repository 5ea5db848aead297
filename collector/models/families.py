"""Discovers the model families of transformers with routers, and builds tiny models of them.

A family is a folder of `transformers.models` whose modeling module declares
`_can_record_outputs["router_logits"]`. `family` finds its text-only base model and its config, `tiny`
builds that model with few weights, and `describe` reports what its routers do.

Guarantees:

- no list is kept by hand: families of later versions of transformers are found, and one that cannot
  be built or read raises an error that names it. Families known not to work are in `NOT_CAPTURED`,
  with the reason;
- a tiny model is reproducible from its seed, all its values are finite, and correction biases, groups
  and dense layers are in effect where the family has them.

Tiny models are for tests and for inspection; they say nothing about a family's quality. Importing
this module is cheap, but calling `families` imports every modeling module (some seconds).

Shapes: E experts, k chosen per token.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from collector.models.routers import find_routers, how_ids_are_obtained

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedConfig, PreTrainedModel

    from collector.models.routers import Router

NOT_CAPTURED: dict[str, str] = {}
"""Families whose routing is not captured, with the reason."""

_E, _K, _HIDDEN, _INNER, _HEAD = 8, 2, 32, 16, 8


def _each(value: Any, *fields: str) -> dict[str, Any]:
    return dict.fromkeys(fields, value)


_SMALL: dict[str, Any] = {
    **_each(_E, "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"),
    **_each(_K, "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts"),
    **_each(1, "n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
    **_each(4, "n_group", "num_expert_group"),
    "topk_group": 2,
    **_each(1, "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"),
    "mlp_only_layers": [0],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    **_each(3, "num_hidden_layers", "n_layers", "encoder_layers", "decoder_layers"),
    **_each(64, "vocab_size", "vocab_size_per_layer_input"),
    **_each(128, "max_position_embeddings", "max_seq_len"),
    "pad_token_id": 0,
    "bos_token_id": 1,
    **_each(2, "eos_token_id", "decoder_start_token_id"),
    **_each(_HIDDEN, "hidden_size", "d_model"),
    **_each(
        _INNER, "intermediate_size", "moe_intermediate_size", "ffn_hidden_size", "shared_expert_intermediate_size",
        "shared_intermediate_size", "shared_experts_intermediate_size", "moe_shared_expert_intermediate_size",
        "dense_intermediate_size", "prefix_dense_intermediate_size", "expert_ffn_hidden_size", "intermediate_size_mlp",
        "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "share_expert_dim", "moe_hidden_size", "router_hidden_size",
        "hidden_size_per_layer_input", "q_lora_rank", "kv_lora_rank", "o_lora_rank", "index_head_dim",
    ),
    **_each(
        4, "num_attention_heads", "num_key_value_heads", "n_heads", "num_heads", "encoder_attention_heads",
        "decoder_attention_heads", "linear_num_heads", "linear_num_key_heads", "linear_num_value_heads",
        "mamba_n_heads", "mamba_num_heads", "swa_num_attention_heads", "swa_num_key_value_heads",
        "num_sliding_attention_heads", "index_n_heads", "sliding_window", "sliding_window_size",
    ),
    **_each(
        _HEAD, "head_dim", "d_kv", "kv_channels", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim",
        "linear_head_dim", "linear_key_head_dim", "linear_value_head_dim", "swa_head_dim", "mamba_d_state",
        "ssm_state_size", "mamba_chunk_size", "chunk_size", "mamba_dt_rank",
    ),
    **_each(2 * _HEAD, "qk_head_dim", "mamba_d_head", "mamba_head_dim"),
    "n_groups": 2,
    "index_topk": 64,  # longer than any test text: otherwise padding would decide ties of the indexer
}  # fmt: skip
"""Small values for the fields of all configs; each config gets only the fields that it has."""

_HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}

_OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_hidden_layers": 3, "layer_group_size": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": _INNER, "moe_num_experts": _E, "moe_top_k": _K},
    },
    "deepseek_ocr2": {"topk_method": "group_limited_greedy"},
    "deepseek_v2": {"topk_method": "group_limited_greedy"},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe", "moe"], "num_key_value_heads": 1, "o_groups": 2},
    "diffusion_gemma": {"global_head_dim": 2 * _HEAD},
    "doge": {"is_moe": True, "num_experts": 16},
    "dots3_note": {"per_layer_config": {}, "head_dim": 2 * _HEAD},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [_INNER, _INNER],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "gemma4": {"enable_moe_block": True, "global_head_dim": 2 * _HEAD},
    **_each(_HYBRID, "kimi_linear", "qwen3_5_moe", "qwen3_next"),
    **_each({"sliding_window": None}, "qwen3_omni_moe", "qwen3_vl_moe"),  # which have the field, but no such layers
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "glm4v_moe": {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "mrope_section": [1, 1, 2],
        },
    },
    "glm5_next": {"index_kpool": 2, "qk_rope_head_dim": 0, "qk_head_dim": _HEAD},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 2},
    "mimo_v2_flash": {"head_dim": 12, "num_key_value_heads": 2},  # a third of a head is rotated
    "minimax_m3_vl": {"rotary_dim": _HEAD},
    "mistral4": {"head_dim": 2 * _HEAD},  # of which one half is rotated
    "nllb_moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2, "encoder_layers": 4, "decoder_layers": 2},
    "qwen4_exp": {"hc_lowrank": _HEAD},
    "switch_transformers": {
        "num_layers": 4, "num_sparse_encoder_layers": 2, "num_decoder_layers": 2, "num_sparse_decoder_layers": 1,
    },
    "unlimited_ocr": {"topk_method": "group_limited_greedy", "sliding_window": 64},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""Fields that a family needs beyond `_SMALL` so that its experts, biases and groups are in effect."""

_DECLARATION = '"router_logits":'
_SELECTION_BIAS = re.compile(r"(^|\.)(e_score_correction_bias|expert_bias|balancing_biases)$")
_KEPT = re.compile(r"(inv_freq|A_log|dt_bias|\.D)$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One folder of `transformers.models` with routers."""

    name: str
    """Name of the folder."""
    model_class: type[PreTrainedModel]
    """The text-only base model."""
    config_class: type[PreTrainedConfig]


@functools.cache
def names() -> tuple[str, ...]:
    """Returns the names of the families with routers in the installed transformers, without importing them."""
    import transformers

    root = Path(transformers.__path__[0]) / "models"
    modules = sorted(root.glob("*/modeling_*.py"))
    return tuple(dict.fromkeys(path.parent.name for path in modules if _DECLARATION in path.read_text("utf-8")))


def families() -> tuple[Family, ...]:
    """Returns all families with routers, by name.

    Raises:
        ValueError: a family has no base model that takes its text config.
    """
    return tuple(family(name) for name in names())


@functools.cache
def family(name: str) -> Family:
    """Returns the family of a name.

    Raises:
        ValueError: there is no such family with routers, or it has no base model that takes its text config.
    """
    from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]

    if name not in names():
        raise ValueError(f"{name!r} is no model family with routers; collector models lists them")
    package = f"transformers.models.{name}"
    known = set(CONFIG_MAPPING_NAMES.values())
    configs = [
        config for config in _classes(f"{package}.configuration_{name}", PreTrainedConfig) if config.__name__ in known
    ]
    outermost = max(configs, key=lambda config: (not config.base_config_key, len(config.sub_configs)))
    text_config = type(outermost().get_text_config())
    mapped: Any = MODEL_MAPPING.get(text_config, None)
    if mapped is not None:
        return Family(name=name, model_class=mapped, config_class=text_config)
    # Some text models of multimodal families are not registered with AutoModel.
    for candidate in _classes(f"{package}.modeling_{name}", PreTrainedModel):
        if candidate.config_class is text_config and candidate.__name__.endswith("TextModel"):
            return Family(name=name, model_class=candidate, config_class=text_config)
    raise ValueError(f"{name}: no base model takes {text_config.__name__} alone; enter the family in NOT_CAPTURED")


def _classes(module: str, base: type) -> Iterator[Any]:
    """Yields the subclasses of `base` that a module itself defines, in its order."""
    for value in vars(importlib.import_module(module)).values():
        if inspect.isclass(value) and issubclass(value, base) and value.__module__ == module:
            yield value


def tiny(family: Family, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """Builds a tiny text-only base model of a family, in float32 and eval mode, with random weights.

    About 3 layers of 32 dimensions, top-2 of 8 experts, a vocabulary of 64, one dense layer where the
    family can have one, groups and correction biases in effect.

    Args:
        family: one of `families`.
        seed: of the weights.
        fields: config fields to override.

    Raises:
        ValueError: the model of this config cannot be built, or has a weight that is not finite.
    """
    config = _tiny_config(family, fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = family.model_class(config).float().eval()
        except Exception as error:
            raise ValueError(
                f"{family.name}: no tiny {family.model_class.__name__} can be built: {type(error).__name__}: {error}"
            ) from error
        with torch.no_grad():
            _randomize(model)
    broken = [name for name, tensor in _tensors(model) if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"{family.name}: {broken} are not finite in a tiny {family.model_class.__name__}")
    return model


def _tiny_config(family: Family, fields: dict[str, Any]) -> PreTrainedConfig:
    known = family.config_class().to_dict()
    small = {name: value for name, value in _SMALL.items() if name in known}
    return family.config_class(**{**small, **_OVERRIDES.get(family.name, {}), **fields})


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _randomize(model: nn.Module) -> None:
    """Redraws all weights, large enough that routing has clear margins and biases change choices."""
    for name, weight in model.named_parameters():
        if _KEPT.search(name):
            continue
        if weight.ndim >= 2:
            weight.normal_(std=weight.shape[-1] ** -0.5)
        else:
            weight.normal_(mean=0.0 if "bias" in name else 1.0, std=0.1)
    for name, tensor in _tensors(model):
        if _SELECTION_BIAS.search(name):
            tensor.normal_(std=0.2)
        elif name.endswith("tid2eid"):
            # A table from token id to experts; each token gets distinct experts.
            tensor.copy_(torch.rand(len(tensor), _E).argsort(-1)[:, : tensor.shape[-1]])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """Describes the routers of a family; E and k come from its default config, None where that leaves them open."""

    family: str
    model: str
    router: str
    n_experts: int | None
    top_k: int | None
    rules: str
    """What chooses experts besides the logits: capacity, selection bias, groups."""
    ids: str
    """How the ids of the chosen experts are obtained."""
    experts: str
    """How the experts' weights are stored."""
    reason: str
    """Why the family is not captured; empty if it is."""


def describe(family: Family) -> Description:
    """Describes a family's routers, from a tiny model and from the default config.

    Raises:
        ValueError: the family is not in `NOT_CAPTURED` but cannot be built or has no router.
    """
    if family.name in NOT_CAPTURED:
        return Description(
            family=family.name, model=family.model_class.__name__, router="", n_experts=None, top_k=None,
            rules="", ids="", experts="", reason=NOT_CAPTURED[family.name],
        )  # fmt: skip
    routers = find_routers(tiny(family))
    classes = list(dict.fromkeys(type(router.module).__name__ for router in routers))
    default = family.config_class()
    n_experts, top_k = geometry(family.name, default)
    return Description(
        family=family.name,
        model=family.model_class.__name__,
        router=", ".join(classes),
        n_experts=n_experts,
        top_k=top_k,
        rules=", ".join(_rules(routers, default)),
        ids=", ".join(dict.fromkeys(how_ids_are_obtained(name) for name in classes)),
        experts=_experts_form(routers[0]),
        reason="",
    )


def geometry(name: str, config: PreTrainedConfig) -> tuple[int | None, int | None]:
    """Returns (E, k) of a family's config, None where the config leaves it open."""
    config = getattr(config, "ffn_config", config)
    n_experts = _first(config, "n_routed_experts", "moe_num_experts", "num_experts", "num_local_experts")
    top_k = _first(config, "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k",
                   "top_k_experts")  # fmt: skip
    if name == "nllb_moe":
        top_k = 2
    elif name == "switch_transformers":
        top_k = 1
    if n_experts is None:
        return None, top_k
    if name == "doge":
        n_experts = int(n_experts**0.5) ** 2  # the experts are the pairs of two sets of keys
    elif name == "zaya":
        n_experts += 1  # skipping the layer counts as an expert
    return n_experts + (getattr(config, "zero_expert_num", 0) or 0), top_k


def _first(config: PreTrainedConfig, *names: str) -> int | None:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)


def _rules(routers: list[Router], default: PreTrainedConfig) -> Iterator[str]:
    if any(hasattr(router.module, "expert_capacity") for router in routers):
        yield "capacity"
    owners = [router.owner for router in routers if router.owner is not None]
    if any(_SELECTION_BIAS.search(name) for owner in owners for name, _ in _tensors(owner)):
        yield "bias"
    if getattr(routers[-1].module, "num_group", None) is not None:
        n_group = _first(default, "n_group", "num_expert_group") or 1
        off = n_group == 1 or getattr(default, "topk_method", None) == "greedy"
        yield "groups (off by default)" if off else f"groups ({default.topk_group} of {n_group})"
    if any(type(router.module).__name__.endswith("HashRouter") for router in routers):
        yield "token table in the first layers"


def _experts_form(router: Router) -> str:
    owner = router.owner
    assert owner is not None
    experts = next((module for module in owner.modules() if "Experts" in type(module).__name__), None)
    if experts is None:
        return "embeddings (no 4-bit form)"
    if any(weight.ndim == 3 for weight in experts.parameters()):
        return "fused 3-D"
    if any(isinstance(module, nn.Linear) for module in experts.modules()):
        return "one Linear per expert"
    return "stacked 2-D"
