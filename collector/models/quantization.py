"""Selects the parameters to quantize, quantizes them while loading or afterwards, and reports the result.

In transformers 5 the experts of most families are fused three-dimensional parameters. The usual
`load_in_4bit` skips them, because it converts `nn.Linear` only: it leaves 95 % of OLMoE-1B-7B in
16 bits. This module converts both, but never routers, norms, embeddings and biases.

`FourBitQuantizer` plugs into transformers' loading as the quantization method "bitsandbytes_experts"
of a model's config. Each tensor is quantized before the next is read, so that peak memory is the
quantized model plus one fused tensor.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from collector.models.four_bit_reading import is_quantized, stored
from collector.models.routers import router_prefixes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from collector.models.four_bit import FourBit

METHOD = "bitsandbytes_experts"


def targets(model: PreTrainedModel) -> set[str]:
    """Returns the names of the parameters to quantize to 4 bits: matrices of `nn.Linear`, and fused experts.

    Routers are excluded, and so are modules that the model's authors keep in float32.
    """
    kept = tuple({*(getattr(model, "_keep_in_fp32_modules", None) or ()),
                  *(getattr(model, "_keep_in_fp32_modules_strict", None) or ())})  # fmt: skip
    found, routers = set(), router_prefixes(model)
    for path, module, name, parameter in _parameters(model):
        if f"{path}.".startswith(routers) or any(part in path for part in kept):
            continue
        linear = isinstance(module, nn.Linear) and name == "weight"
        if linear or _is_fused(path, module, name, parameter):
            found.add(f"{path}.{name}")
    return found


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    """Yields (module's path, module, name, parameter) under the names in the model's code, tied ones once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield path, module, name, parameter
        if parametrize.is_parametrized(module):
            for name, parametrization in module.parametrizations.items():
                yield path, module, name, parametrization.original


def _is_fused(path: str, module: nn.Module, name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter holds the matrices of several experts."""
    if isinstance(module, (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)) or "bias" in name:
        return False
    # DBRX stacks the matrices of its experts in two dimensions
    return parameter.ndim == 3 or (parameter.ndim == 2 and "experts" in path.split("."))


def is_expert(name: str) -> bool:
    """Whether a parameter with this full name is a routed expert's matrix."""
    path, _, leaf = name.rpartition(".")
    return "bias" not in leaf and any(part == "experts" or part.startswith("expert_") for part in path.split("."))


def quantize_model(model: PreTrainedModel, kind: FourBit, *, double: bool) -> None:
    """Quantizes a loaded model in place, tensor by tensor."""
    from collector.models.four_bit import quantize_parameter

    for target in sorted(targets(model)):
        path, _, name = target.rpartition(".")
        module = model.get_submodule(path)
        if not is_quantized(module, name):
            quantize_parameter(module, name, getattr(module, name), kind, double=double)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Treatment:
    """Number and size of the parameters that are stored in one format."""

    parameters: int
    bytes: int
    """Size on the device, scales included."""


def treatments(model: nn.Module) -> dict[str, Treatment]:
    """Counts all parameters by storage format: `nf4`, `fp4`, `int8`, `bfloat16` …; largest share first."""
    counts: dict[str, list[int]] = {}
    for _, module, name, parameter in _parameters(model):
        how, numel, size = _held(module, name, parameter)
        total = counts.setdefault(how, [0, 0])
        total[0] += numel
        total[1] += size
    ranked = sorted(counts.items(), key=lambda item: -item[1][0])
    return {how: Treatment(parameters=numel, bytes=size) for how, (numel, size) in ranked}


def _held(module: nn.Module, name: str, parameter: torch.Tensor) -> tuple[str, int, int]:
    state: Any = None
    if is_quantized(module, name):
        state = stored(module, name)[1]
    elif getattr(parameter, "quant_state", None) is not None:  # a Linear4bit of bitsandbytes
        state = parameter.quant_state  # type: ignore[attr-defined]
    if state is None:
        return str(parameter.dtype).removeprefix("torch."), parameter.numel(), parameter.numel() * parameter.itemsize
    extra = [state.absmax, *([state.state2.absmax] if state.nested else [])]
    size = parameter.numel() * parameter.itemsize + sum(part.numel() * part.itemsize for part in extra)
    return state.quant_type, math.prod(state.shape), size


def unquantized_experts(model: PreTrainedModel) -> list[str]:
    """Returns the names of routed experts' matrices that are stored in 16 or 32 bits."""
    routers = router_prefixes(model)
    return [
        f"{path}.{name}"
        for path, module, name, parameter in _parameters(model)
        if parameter.ndim > 1
        and is_expert(f"{path}.{name}")
        and "float" in _held(module, name, parameter)[0]
        and not f"{path}.".startswith(routers)
    ]


# -- while loading -----------------------------------------------------------------------------------


@register_quantization_config(METHOD)
class FourBitConfig(QuantizationConfigMixin):
    """The quantization config of a checkpoint, as stored in its config.json."""

    def __init__(self, kind: FourBit = "nf4", *, double: bool = True, **_: Any) -> None:
        self.quant_method: Any = METHOD
        self.kind = kind
        self.double = double


class _Store(ConversionOps):
    """The last step of loading a parameter: quantizes it, or restores it from a 4-bit checkpoint."""

    def __init__(self, quantizer: FourBitQuantizer) -> None:
        self.hf_quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *_patterns: Any, **context: Any) -> dict[str, Any]:
        """Replaces parameters by quantized tensors; returns those that transformers still has to set."""
        from collector.models.four_bit import quantize_parameter, replace

        model, missing = context["model"], context.get("missing_keys")
        tensors = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        if not self.hf_quantizer.pre_quantized:
            config = self.hf_quantizer.quantization_config
            for name, value in tensors.items():
                owner, _, leaf = name.rpartition(".")
                quantize_parameter(model.get_submodule(owner), leaf, value, config.kind, double=config.double)
            loaded = set(tensors)
        else:
            owner, _, leaf = context["full_layer_name"].rpartition(".")
            if len(tensors) == 1:  # not quantized in this checkpoint
                return {leaf: next(iter(tensors.values()))}
            state = {name.removeprefix(f"{leaf}."): value for name, value in tensors.items() if name != leaf}
            replace(model.get_submodule(owner), leaf, tensors[leaf], state)
            loaded = {context["full_layer_name"]}
        if missing is not None:
            missing -= loaded
        return {}


@register_quantizer(METHOD)
class FourBitQuantizer(HfQuantizer):
    """Quantizes Linear layers and fused experts as transformers loads them, or loads quantized ones."""

    quantization_config: FourBitConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        self.targets = targets(model)
        stats = ("absmax", "nested_absmax", "quant_map", "nested_quant_map",
                 "quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")  # fmt: skip
        leaves = sorted({target.rpartition(".")[2] for target in self.targets})
        self.serialized_names = {leaf: [leaf, *(f"{leaf}.{stat}" for stat in stats)] for leaf in leaves}
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:  # noqa: ARG002
        """Whether to quantize a tensor after reading it."""
        return param_name in self.targets

    def get_quantize_ops(self) -> _Store:
        """Returns the operation that quantizes a float tensor."""
        return _Store(self)

    def get_load_operations(self) -> dict[str, Any]:
        """Returns the operation that restores a quantized tensor."""
        return {"deserialize": _Store}

    @property
    def quantized_element_size(self) -> float:
        """Bytes per parameter, for the placement on devices."""
        return 0.5

    def is_serializable(self) -> bool:
        """Returns True: the state dict can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """False: the collector only runs inference."""
        return False
