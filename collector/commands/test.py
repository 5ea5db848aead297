"""`collector test`: tests which experts specialize, and how reliable the answer is."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Any, Literal

from collector.commands.arguments import RowFormat, RunPath

if TYPE_CHECKING:
    from collector.query.warehouse import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Test:
    """Test which experts specialize in which label, by a permutation test over documents.

    For every router, label and expert it tests whether a larger share of the label's tokens chooses the expert than of
    all documents' tokens. Tokens of a document are correlated, so labels are shuffled between whole documents, and
    Student's t of the label's documents has to agree. q values control the false discovery rate over all rows
    (Benjamini-Hochberg). The most certain rows come first.
    """

    run_: RunPath
    """The run directory."""
    alternative: Literal["greater", "less", "two-sided"] = "greater"
    """Find experts that a label chooses more often than the pooled documents do, less often, or either."""
    level: float = 0.05
    """False discovery rate among the significant rows."""
    resamples: int = 1000
    """Number of permutations; with --split-half, of splits; with --sample-size-curve, of bootstrap samples per size."""
    seed: int = 0
    """Seed of the permutations, splits, samples or folds."""
    by: str = "label"
    """What to group by: label (as recorded), source, script or length, but not a grouping of tokens."""
    match: str | None = None
    """Compare labels within strata of tokens or documents: groupings, for example position,token_class.
    Each label's choices are compared with those that all documents together make in its mix of strata."""
    stack: str | None = None
    """Test only the routers of this stack."""
    layer: int | None = None
    """Test only this layer, numbered as in the model."""
    labels: tuple[str, ...] | None = None
    """Use only the documents with these labels."""
    include_special: bool = False
    """Also count the special tokens that the tokenizer adds."""
    split_half: bool = False
    """Measure reliability instead: how well do two random halves of each label's documents agree about the experts?"""
    sample_size_curve: bool = False
    """Show instead how domain specialization and its 95 % interval change with the number of documents."""
    probe: bool = False
    """Measure instead how well a linear probe tells the labels of held-out documents from their routing."""
    folds: int = 5
    """With --probe: parts into which the documents are divided, each predicted by a fit to the others."""
    format: RowFormat = "table"
    """Format of the rows on standard output."""

    def __post_init__(self) -> None:
        """Rejects two questions at once."""
        if self.split_half + self.sample_size_curve + self.probe > 1:
            raise ValueError("--split-half, --sample-size-curve and --probe are different questions: ask one at a time")

    def run(self) -> int:
        """Prints one row per cell."""
        from collector.look import terminal
        from collector.query import inference, warehouse
        from collector.query.document_counts import document_counts

        where: dict[str, Any] = {
            "stack": self.stack, "layer": self.layer, "labels": self.labels, "include_special": self.include_special,
        }  # fmt: skip
        with warehouse.one_line_errors():
            run = warehouse.open_run(self.run_, by=self.by, match=self.match)
            if self.sample_size_curve:
                table = inference.sample_size_curve(run, resamples=self.resamples, seed=self.seed, **where)
            elif self.split_half:
                table = inference.split_half(document_counts(run, **where), splits=self.resamples, seed=self.seed)
            elif self.probe:
                table = inference.label_probe(document_counts(run, **where), folds=self.folds, seed=self.seed)
            else:
                table = inference.specialization_test(
                    document_counts(run, **where), resamples=self.resamples, seed=self.seed, level=self.level,
                    alternative=self.alternative,
                )  # fmt: skip
                sys.stderr.write(f"{inference.remark(table, self.resamples, self.level)}\n")
            sys.stderr.writelines(f"{remark}\n" for remark in self._matched(run, where))
            terminal.uncertain(table, self.format)
        return 0

    def _matched(self, run: Run, where: dict[str, Any]) -> list[str]:
        """Returns what a test or another question left out because it had no match."""
        if run.matching is None:
            return []
        if self.split_half or self.sample_size_curve:
            return run.matched("domain_specialization", **where)
        return run.matching.test_remarks(where | {"labels": None if self.labels is None else [*self.labels]})
