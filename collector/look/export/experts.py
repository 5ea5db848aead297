"""Writes a set of experts as other programs read it.

- EasySteer switches experts off while a model runs; its `layer_configs` have the mode `deactivate` for each layer.
- ESFT trains these experts only; its expert configuration lists them for each layer that has experts.
- llama.cpp has a proposed option, `--omit-experts` (pull request 15165, not merged), which leaves the same experts out
  of every layer.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from collector.query.warehouse import Run

Program = Literal["easysteer", "esft", "llama.cpp"]


def written(run: Run, rows: Sequence[Mapping[str, Any]], to: Program) -> str:
    """Returns the content of a file, or for llama.cpp the option.

    Args:
        run: with the routers of the experts.
        rows: the set, each with stack, layer and expert.
        to: the program.

    Raises:
        ValueError: the program cannot have such a set.
    """
    by_layer = _by_layer(run, rows, to)
    chosen = {str(layer): experts for layer, experts in by_layer.items() if experts}
    if to == "easysteer":
        modes = {layer: {"mode": "deactivate", "expert_ids": experts} for layer, experts in chosen.items()}
        return json.dumps({"layer_configs": modes}) + "\n"
    if to == "esft":
        # ESFT looks every layer up that has experts
        experts = {str(layer): experts for layer, experts in by_layer.items()}
        return json.dumps({"experts": experts, "shared_experts": False, "non_expert_modules": False}) + "\n"
    (first, own), *others = by_layer.items()
    if differing := [layer for layer, experts in others if experts != own]:
        raise ValueError(
            f"llama.cpp omits the same experts in every layer, and this set has {_told(own)} in layer {first} and "
            f"{_told(by_layer[differing[0]])} in layer {differing[0]}"
        )
    return f"--omit-experts {','.join(map(str, own))}\n"


def _by_layer(run: Run, rows: Sequence[Mapping[str, Any]], to: Program) -> dict[int, list[int]]:
    """The experts of every layer of the run's decoder, also of those that have none in the set."""
    stacks = sorted({row["stack"] for row in rows})
    if len(stacks) > 1 or stacks[0].partition(".")[0] != "decoder":
        raise ValueError(f"{to} numbers the layers of one decoder, and this set has experts of {' and '.join(stacks)}")
    experts = defaultdict(list)
    for row in rows:
        experts[row["layer"]].append(row["expert"])
    return {one["layer"]: sorted(experts[one["layer"]]) for one in run.info["layers"] if one["stack"] == stacks[0]}


def _told(experts: Sequence[int]) -> str:
    return f"experts {', '.join(map(str, experts))}" if experts else "no expert"
