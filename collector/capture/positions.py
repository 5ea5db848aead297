"""Spares a model two questions about its input, because the answers are known.

Where no token attends to those after it, padding on the right needs no mask, and the kernels for causal attention run.
transformers then looks at the position ids for several texts packed into one row. It reads the answer from the device,
and nothing more is queued until every pass before has ended, so the device would wait for the host at each batch.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

from transformers import masking_utils

from collector.capture.padding import encoder_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

_here = threading.local()


def looks_back_only(model: PreTrainedModel) -> bool:
    """Whether no token of a model attends to those after it, so that padding on the right needs no mask."""
    if encoder_of(model) is not None or not getattr(model.config, "is_causal", True):
        return False
    causal = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    return bool(causal) and all(causal)


@contextlib.contextmanager
def one_text_per_row() -> Iterator[None]:
    """Context in which models of this thread are not asked for texts packed into one row."""
    before, _here.one_text = getattr(_here, "one_text", False), True
    try:
        yield
    finally:
        _here.one_text = before


_look_for_packed_texts = masking_utils.find_packed_sequence_indices


def _unless_known(position_ids: Any) -> Any:
    """Transformers' own search, except in the context above, where there is nothing to find."""
    return None if getattr(_here, "one_text", False) else _look_for_packed_texts(position_ids)


masking_utils.find_packed_sequence_indices = _unless_known
