"""Runs one text twice, as the model is and with edits of its routing, and compares what the model says comes next."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import torch

from collector.look.trace import collecting, pieces
from collector.look.trace.reading import read
from collector.models import heads, loading
from collector.models.edited_routing import EditedRouting
from collector.models.edits import tell
from collector.models.routers import find_routers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from collector.config import CaptureConfig, ModelConfig
    from collector.look.trace.reading import Trace
    from collector.models.edits import Edit
    from collector.models.heads import Head
    from collector.models.loading import LoadedModel
    from collector.query.warehouse import Run

MOST = 10
"""Next tokens that are told."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Next:
    """A token that may come next."""

    token: str
    """The vocabulary's spelling, made visible."""
    before: float
    """Its probability in the model as it is."""
    after: float
    """Its probability with the edits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """A text's routing and what comes next, before and after."""

    before: Trace
    after: Trace
    first_before: tuple[Next, ...]
    """The most probable next tokens of the model as it is; empty where it predicts none."""
    first_after: tuple[Next, ...]
    """The most probable next tokens with the edits."""
    divergence: float | None
    """KL(before‖after) of the next token, in nats."""
    silence: str
    """Why there are no next tokens, or nothing."""
    was_cut: bool
    """Whether the text was truncated."""

    @property
    def changes(self) -> str:
        """How many tokens get other experts, router by router, in words."""
        parts = []
        for old, new in zip(self.before.routers, self.after.routers, strict=True):
            pairs = zip(old.decisions, new.decisions, strict=True)
            changed = sum(set(one.experts) != set(other.experts) for one, other in pairs)
            parts.append(f"{self.before.name(old)} {changed} of {len(old.tokens)}")
        return f"Tokens with other experts: {', '.join(parts)}"


def compare(
    text: str, model: ModelConfig, capture: CaptureConfig, device: Literal["auto", "cpu", "cuda"],
    edits: Sequence[Edit], positions: Sequence[int] | None = None,
) -> Outcome:  # fmt: skip
    """Runs a text as the model is, and with edits.

    Args:
        text: the document.
        model: settings of the model.
        capture: which routers to show, and the maximum number of tokens.
        device: where the model runs.
        edits: of its routing.
        positions: tokens at which the edits act, special ones counted (default: all).

    Raises:
        ValueError: the model cannot be loaded, has no such router or expert, or the text no such position.
    """
    if limited := [edit for edit in edits if edit.limits != (None, None, None)]:
        raise ValueError(f"--edit {tell(limited[0])!r}: of a single text, --position says where edits act")
    loaded = loading.load(model, collecting.device_of(device))
    head, silence = _head(model, loaded)
    with collecting.collected(text, model, capture, device, loaded=loaded) as run:
        before, ids, was_cut = read(run), _ids(run), collecting.was_cut(run)
    if beyond := [each for each in positions or () if not 0 <= each < len(before.routers[0].tokens)]:
        raise ValueError(f"--position {beyond[0]}: the text has tokens 0 to {len(before.routers[0].tokens) - 1}")
    plain = _next(loaded, head, ids)

    def where(_stack: str, count: int) -> torch.Tensor:
        acts = torch.zeros(count, dtype=torch.bool)
        acts[[each for each in positions or () if each < count]] = True
        return acts

    routers = find_routers(loaded.model)
    with EditedRouting(loaded.model, routers, edits, where if positions else None):
        with collecting.collected(text, model, capture, device, loaded=loaded) as run:
            after = read(run)
        edited = _next(loaded, head, ids)
    if plain is None or edited is None:
        return Outcome(before=before, after=after, first_before=(), first_after=(), divergence=None, silence=silence,
                       was_cut=was_cut)  # fmt: skip
    spelled = {number: token for number, token, _ in loading.readable_vocabulary(loaded.tokenizer)}

    def first(of_v: torch.Tensor) -> tuple[Next, ...]:
        return tuple(
            Next(token=pieces.visible(spelled.get(each), each), before=float(plain[each]), after=float(edited[each]))
            for each in of_v.topk(min(MOST, len(of_v))).indices.tolist()
        )

    divergence = float(torch.special.xlogy(plain, plain / edited).sum())
    return Outcome(before=before, after=after, first_before=first(plain), first_after=first(edited),
                   divergence=divergence, silence="", was_cut=was_cut)  # fmt: skip


def _head(model: ModelConfig, loaded: LoadedModel) -> tuple[Head | None, str]:
    """Loads the model's head, or says why there is none."""
    if loaded.model.config.is_encoder_decoder:
        return None, "An encoder predicts no next token."
    try:
        return heads.load_head(model, loaded), ""
    except ValueError as error:
        return None, f"No next tokens: {str(error).partition(': ')[2]}"


def _ids(run: Run) -> list[int]:
    return [token for (token,) in run.sql("select token_id from tokens order by tok").fetchall()]


@torch.inference_mode()
def _next(loaded: LoadedModel, head: Head | None, ids: Sequence[int]) -> torch.Tensor | None:
    """[V] the probabilities of what follows the text, in double precision on the host."""
    if head is None:
        return None
    tokens = torch.tensor([ids], device=loaded.device)
    hidden = loaded.model(input_ids=tokens, use_cache=False).last_hidden_state[0, -1:]
    return head.logits(hidden)[0].double().softmax(-1).cpu()
