"""Commands about models, which need no run: `collector quantize`, `collector models`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from collector.config import Dtype, ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize:
    """Write a quantized copy of a model, so that replicas read a quarter of the bytes: `collector quantize MODEL OUT`.

    Load the copy with `collector collect --model OUT`.
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(name="model")]
    """A Mixture-of-Experts model: its id on the Hugging Face hub, or a local folder."""
    out: tyro.conf.Positional[str]
    """The folder to write, new or empty."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    quantization: Literal["nf4", "fp4"] = "nf4"
    """`nf4`: 4-bit normal floats. `fp4`: 4-bit floats."""
    double_quantization: bool = True
    """Also quantize the scales of 4-bit blocks."""
    dtype: Dtype = "auto"
    """Precision of the tensors that are not quantized."""
    unquantized_experts: bool = False
    """Accept a family whose experts cannot be quantized."""

    def run(self) -> int:
        """Loads and quantizes the model tensor by tensor, and writes it."""
        from collector.models import checkpoints, footprint, heads, loading

        config = ModelConfig(
            model=self.source, revision=self.revision, dtype=self.dtype, quantization=self.quantization,
            double_quantization=self.double_quantization, unquantized_experts=self.unquantized_experts,
        )  # fmt: skip
        out = Path(self.out)
        checkpoints.require_empty(out)
        loaded = loading.load(config, "cpu")
        try:
            head = heads.stored_head(config, loaded)
        except ValueError as error:  # most uses need none
            sys.stderr.write(
                f"The copy has no language-model head, so --record loss and vocabulary will refuse it. {error}\n"
            )
            head = {}
        written = checkpoints.save(loaded.model, loaded.tokenizer, out, head)
        summary = footprint.describe(loaded.model, loaded.compute_dtype)["summary"]
        sys.stdout.write(f"{summary}\n{out}: {footprint.size(written)}\n")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models:
    """List the model families whose routing can be collected, and how it is read from each."""

    format: Literal["table", "markdown"] = "table"
    """Format of the list on standard output."""

    def run(self) -> int:
        """Reads the families from the installed transformers and prints them."""
        from transformers.utils import logging

        from collector.look import terminal
        from collector.models import families

        logging.set_verbosity_error()  # tiny configs draw warnings about their sizes
        terminal.models([families.describe(family) for family in families.families()], self.format)
        return 0
