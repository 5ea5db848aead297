"""Compares the outputs of all pairs of experts over a block of tokens: cosine, angular similarity, HSIC₁.

HSIC₁ (Song et al. 2012, JMLR 13, equation 5) of Gram matrices K and L without their diagonals, over n >= 4 tokens:

    [tr(KL) + (1'K1)(1'L1) / ((n - 1)(n - 2)) - 2 / (n - 2) 1'KL1] / (n (n - 3))

Its sums over blocks make the debiased CKA of arXiv 2010.15327. Gram matrices are in float64: a single massive
activation leaves little of float32 in what is subtracted here.

A pair is compared over all tokens, over those routed to either or to both of its experts, and over the usual ones: all
but those with massive activations (arXiv 2402.17762), whose largest entry is more than 1,000 times their median entry;
here of y, the sum of g f over the chosen experts. Sums over the tokens of a pair are products with masks, so all pairs
are computed at once.

Shapes: B tokens of a block, E experts, H hidden size, P = E (E - 1) / 2 pairs i < j in order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

OVER = ("sampled", "either", "both", "usual")
"""Which tokens a pair is compared over: all of the block, or some."""
_MASSIVE = 1000.0
_CHUNK = 1 << 24
"""Numbers that are held in a higher precision at once."""


class PairSums(NamedTuple):
    """Sums over the tokens of each pair of experts."""

    n_p: torch.Tensor
    """[P] tokens."""
    cosine_p: torch.Tensor
    """[P] sum of cos(f_i, f_j); 0 where one of them is 0."""
    angular_p: torch.Tensor
    """[P] sum of 1 - arccos(cos) / pi."""
    hsic_p: torch.Tensor
    """[P] HSIC₁ of i and j; 0 below 4 tokens."""
    hsic_first_p: torch.Tensor
    """[P] HSIC₁ of i with itself, over the same tokens."""
    hsic_second_p: torch.Tensor
    """[P] HSIC₁ of j with itself, over the same tokens."""


def massive(outputs_beh: torch.Tensor, weights_be: torch.Tensor) -> torch.Tensor:
    """Returns whether each token has a massive activation, [B].

    Args:
        outputs_beh: [B, E, H] f_e(x).
        weights_be: [B, E] g, 0 for experts that were not chosen.
    """
    y_bh = torch.bmm(weights_be[:, None].float(), outputs_beh.float()).squeeze(1).abs()
    return y_bh.amax(1) > _MASSIVE * y_bh.median(1).values


def pair_sums(outputs_beh: torch.Tensor, weights_be: torch.Tensor) -> dict[str, PairSums]:
    """Compares all pairs of experts over a block.

    Args:
        outputs_beh: [B, E, H] f_e(x) of every token and expert.
        weights_be: [B, E] g, 0 for experts that were not chosen.

    Returns:
        The sums by `OVER`; `usual` only if the block has a massive activation.
    """
    tokens, experts, _ = outputs_beh.shape
    routed_be, usual_b = weights_be != 0, ~massive(outputs_beh, weights_be)
    wanted = OVER[:-1] if usual_b.all() else OVER
    sums = {over: outputs_beh.new_zeros((3, experts, experts), dtype=torch.float64) for over in wanted}
    step = max(1, _CHUNK // (experts * max(experts, outputs_beh.shape[2])))
    for start in range(0, tokens, step):
        chunk = slice(start, start + step)
        unit = torch.nn.functional.normalize(outputs_beh[chunk].float(), dim=2)
        cosine_bee = torch.bmm(unit, unit.transpose(1, 2)).clamp_(-1, 1)
        angular_bee = 1 - cosine_bee.arccos() / torch.pi
        for over in wanted:
            kept_bee = _kept(over, routed_be[chunk], usual_b[chunk])
            for total, each in zip(sums[over], (kept_bee, cosine_bee, angular_bee), strict=True):
                total += (each * kept_bee).sum(0, dtype=torch.float64)
    gram_ebb = _grams(outputs_beh)
    first, second = torch.triu_indices(experts, experts, 1, device=outputs_beh.device).unbind()
    found = {}
    for over in wanted:
        if over == "usual":
            kept = usual_b.nonzero().squeeze(1)
            hsic = _over_all(gram_ebb[:, kept][:, :, kept])
        elif over == "sampled":
            hsic = _over_all(gram_ebb)
        else:
            hsic = _over_some(gram_ebb, routed_be, over)
        pairs = (*sums[over], hsic.cross, hsic.own, hsic.own.T)
        found[over] = PairSums(*(each[first, second] for each in pairs))
    return found


def _kept(over: str, routed_be: torch.Tensor, usual_b: torch.Tensor) -> torch.Tensor:
    """Whether each token counts for each pair, [B, E, E]."""
    if over == "either":
        kept_bee = routed_be[:, :, None] | routed_be[:, None]
    elif over == "both":
        kept_bee = routed_be[:, :, None] & routed_be[:, None]
    else:
        every_b = usual_b if over == "usual" else torch.ones_like(usual_b)
        kept_bee = every_b[:, None, None].expand(-1, routed_be.shape[1], routed_be.shape[1])
    return kept_bee.float()


class _Hsic(NamedTuple):
    """HSIC₁ over the tokens of each pair, [E, E]."""

    cross: torch.Tensor
    """Of i and j."""
    own: torch.Tensor
    """Of i with itself, over the tokens of i and j."""


def _grams(outputs_beh: torch.Tensor) -> torch.Tensor:
    """Gram matrices of each expert's outputs without their diagonals, [E, B, B]."""
    tokens, experts, hidden = outputs_beh.shape
    gram_ebb = outputs_beh.new_empty((experts, tokens, tokens), dtype=torch.float64)
    step = max(1, _CHUNK // (tokens * hidden))
    for start in range(0, experts, step):
        f_ebh = outputs_beh[:, start : start + step].double().transpose(0, 1)
        gram_ebb[start : start + step] = torch.bmm(f_ebh, f_ebh.transpose(1, 2))
    gram_ebb.diagonal(dim1=1, dim2=2).zero_()
    return gram_ebb


def _hsic(n: torch.Tensor, trace: torch.Tensor, sums: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """HSIC₁ from n, tr(KL), (1'K1)(1'L1) and 1'KL1; 0 below 4 tokens."""
    few, n = n < 4, n.clamp_min(4)
    value = (trace + sums / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows) / (n * (n - 3))
    return torch.where(few, 0.0, value)


def _over_all(gram_ebb: torch.Tensor) -> _Hsic:
    experts, tokens = gram_ebb.shape[:2]
    flat, rows_eb = gram_ebb.flatten(1), gram_ebb.sum(2)
    total_e = rows_eb.sum(1)
    n = total_e.new_full((), tokens)
    cross = _hsic(n, flat @ flat.T, torch.outer(total_e, total_e), rows_eb @ rows_eb.T)
    return _Hsic(cross, cross.diagonal()[:, None].expand(experts, experts))


def _over_some(gram_ebb: torch.Tensor, routed_be: torch.Tensor, over: str) -> _Hsic:
    """Over the tokens routed to either or both of each pair; K and L lose the rows and columns of the others."""
    kept_ibj = _kept(over, routed_be, routed_be[:, 0]).double().transpose(0, 1)
    n = kept_ibj.sum(1)
    rows_ibj = torch.bmm(gram_ebb, kept_ibj) * kept_ibj  # 1'K by token
    total_ij = rows_ibj.sum(1)
    rows = torch.einsum("iaj,jai->ij", rows_ibj, rows_ibj)
    cross = _hsic(n, _trace(gram_ebb, routed_be.T.double(), over), total_ij * total_ij.T, rows)
    squares_ij = (torch.bmm(gram_ebb.square(), kept_ibj) * kept_ibj).sum(1)  # tr(KK)
    return _Hsic(cross, _hsic(n, squares_ij, total_ij.square(), rows_ibj.square().sum(1)))


def _trace(gram_ebb: torch.Tensor, a_eb: torch.Tensor, over: str) -> torch.Tensor:
    """tr(KL) over the tokens of each pair, [E, E]; the mask of a pair is a sum of products of masks of i and of j."""
    columns_ebb = gram_ebb * a_eb[:, None]
    within_ebb = columns_ebb * a_eb[:, :, None]
    within = within_ebb.flatten(1)
    if over == "both":
        return within @ within.T
    # Those of i, and those of j that are not of i; subtracting those of neither from all would lose digits.
    others_ebb = gram_ebb - columns_ebb
    between_ebb = others_ebb * a_eb[:, :, None]
    trace = within @ gram_ebb.flatten(1).T + 2 * between_ebb.flatten(1) @ columns_ebb.flatten(1).T
    return trace + (others_ebb - between_ebb).flatten(1) @ within.T
