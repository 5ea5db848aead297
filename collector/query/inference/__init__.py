"""Statistical inference about a run: how much its numbers would vary with other documents of the same kind.

    intervals(run, "domain_specialization", layer=5)            the query's rows, each with an interval
    specialization_test(document_counts(run))                    which experts specialize in which label
    split_half(document_counts(run))                             do two halves of the documents agree
    sample_size_curve(run, "effective_experts")                  would more documents change the answer
    corrected(run, "effective_experts")                          the bias of few documents taken off

Tokens of one document are correlated, so whole documents are drawn, shuffled and split. Everything works on counts per
document (`collector.query.document_counts`); nothing here reads tokens.
"""

from collector.query.inference.bootstrap import intervals
from collector.query.inference.correction import corrected, is_quick
from collector.query.inference.curves import sample_size_curve
from collector.query.inference.permutation import remark, specialization_test
from collector.query.inference.reliability import split_half

__all__ = ["corrected", "intervals", "is_quick", "remark", "sample_size_curve", "specialization_test", "split_half"]
