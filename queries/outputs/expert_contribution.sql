-- Question: How much does each expert add to its layer's output, label by label?
-- Formula: f = the expert's output before its routing weight g, y = the sum of g f over a token's picks,
--   shared experts apart; c = <g f, y> / |y|^2, the part of y that this pick accounts for: signed, it sums to
--   1 over a token's picks. N_D = tokens of label D, N_eD = picks that e computed for them, drops taken off.
--   contribution             sum of c / N_D, e's share of the layer's output; sums to 1 over the layer.
--     Baseline 1/E.
--   contribution_if_chosen   sum of c / N_eD. Baseline 1/k.
--   saliency                 sum of g |f| / N_eD (REAP). Baseline the same over all the layer's picks of D.
--   activation_norm          sum of |f| / N_eD. Baseline as for saliency.
--   squared_activation_norm  sum of |f|^2 / N_eD. Baseline as for saliency.
--   ean                      sum of |f| / N_D, the expert activation norm per token. Baseline the layer's
--     mean.
--   weighted_ean             sum of g |f| / N_D. Baseline the layer's mean.
--   With pooled, all labels together: label is null.
-- Source: contribution: ours. Saliency: REAP, arXiv 2510.13999, which also compares EAN and its weighted
--   form; (squared) activation norms: arXiv 2606.15716. None of them shows that a model needs the expert.
-- Grain: metric, stack, layer, label, expert; every expert of the layer. n = N_D, or N_eD where it divides.
-- Reads: assignments, label_outputs
-- Example: --layer 4 --labels kor_Hang
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
--   pooled boolean = false: all labels together
with effects as (
    select
        *,
        sum(picks) over (partition by stack, layer, label) as all_picks,
        sum(norm) over (partition by stack, layer, label) as all_norm,
        sum(squared_norm) over (partition by stack, layer, label) as all_squared_norm,
        sum(weighted_norm) over (partition by stack, layer, label) as all_weighted_norm
    from label_effects('label_outputs', 'assignments', $stack, $layer, $labels, $include_special, $pooled)
),

metrics as (
    select
        'contribution' as metric,
        *,
        contribution / tokens as value,
        1 / n_experts as baseline,
        tokens as n
    from effects
    union all
    select
        'contribution_if_chosen' as metric,
        *,
        contribution / nullif(picks, 0) as value,
        1 / top_k as baseline,
        picks::bigint as n
    from effects
    union all
    select
        'saliency' as metric,
        *,
        weighted_norm / nullif(picks, 0) as value,
        all_weighted_norm / nullif(all_picks, 0) as baseline,
        picks::bigint as n
    from effects
    union all
    select
        'activation_norm' as metric,
        *,
        norm / nullif(picks, 0) as value,
        all_norm / nullif(all_picks, 0) as baseline,
        picks::bigint as n
    from effects
    union all
    select
        'squared_activation_norm' as metric,
        *,
        squared_norm / nullif(picks, 0) as value,
        all_squared_norm / nullif(all_picks, 0) as baseline,
        picks::bigint as n
    from effects
    union all
    select
        'ean' as metric,
        *,
        norm / tokens as value,
        all_norm / (n_experts * tokens) as baseline,
        tokens as n
    from effects
    union all
    select
        'weighted_ean' as metric,
        *,
        weighted_norm / tokens as value,
        all_weighted_norm / (n_experts * tokens) as baseline,
        tokens as n
    from effects
)

select
    metric,
    stack,
    layer,
    label,
    expert,
    value,
    baseline,
    n
from metrics
order by metric, stack, layer, label, expert
