"""`collector test`: which experts specialize, and how far the answer can be trusted."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, Literal

from collector.commands.arguments import RowFormat, RunPath


@dataclasses.dataclass(frozen=True, kw_only=True)
class Test:
    """Test which experts specialize in which label, by shuffling the labels of documents.

    For every router, label and expert: is the share of the label's tokens that choose the expert larger than that of
    all documents together? Tokens of a document are correlated, so documents are what is shuffled; q values keep the
    rate of false discoveries over all rows (Benjamini-Hochberg). Most certain first.
    """

    run_: RunPath
    """The run directory."""
    alternative: Literal["greater", "less", "two-sided"] = "greater"
    """Look for experts that a label chooses more than the pooled documents do, less, or either."""
    level: float = 0.05
    """The rate of false discoveries among the significant rows."""
    resamples: int = 1000
    """Shuffles of the labels; of the split halves, splits; of the curve, bootstrap samples at each size."""
    seed: int = 0
    """Of the shuffles."""
    by: str = "label"
    """What labels are: label (as recorded), source, script or length; not groups of tokens."""
    stack: str | None = None
    """Only the routers of this stack."""
    layer: int | None = None
    """Only this layer, by the model's own number."""
    labels: tuple[str, ...] | None = None
    """Only the documents with these labels."""
    include_special: bool = False
    """Also count the tokens that the tokenizer added itself."""
    split_half: bool = False
    """Instead: do two random halves of each label's documents agree about the experts?"""
    sample_size_curve: bool = False
    """Instead: how do domain specialization and its 95 % interval change with the number of documents?"""
    format: RowFormat = "table"
    """How the rows are written to standard output."""

    def __post_init__(self) -> None:
        """Refuses two questions at once."""
        if self.split_half and self.sample_size_curve:
            raise ValueError("--split-half and --sample-size-curve are two questions: ask one at a time")

    def run(self) -> int:
        """Prints one row per cell."""
        from collector.look import terminal
        from collector.query import inference, warehouse
        from collector.query.document_counts import document_counts

        where: dict[str, Any] = {
            "stack": self.stack, "layer": self.layer, "labels": self.labels, "include_special": self.include_special,
        }  # fmt: skip
        with warehouse.one_line_errors():
            run = warehouse.open_run(self.run_, by=self.by)
            if self.sample_size_curve:
                table = inference.sample_size_curve(run, resamples=self.resamples, seed=self.seed, **where)
            elif self.split_half:
                table = inference.split_half(document_counts(run, **where), splits=self.resamples, seed=self.seed)
            else:
                table = inference.specialization_test(
                    document_counts(run, **where), resamples=self.resamples, seed=self.seed, level=self.level,
                    alternative=self.alternative,
                )  # fmt: skip
                sys.stderr.write(f"{inference.remark(table, self.resamples, self.level)}\n")
            terminal.uncertain(table, self.format)
        return 0
