-- Question: How often is each expert chosen for each label's tokens?
-- Formula: N_D = tokens of label D, N_eD = times that expert e was among the k chosen for one of them,
--   w_e = the weight that the model applied.
--   selection_share      N_eD / (k N_D), of all picks of D; sums to 1 per layer and label. Baseline 1/E.
--   selection_frequency  N_eD / N_D, of all tokens of D (ESF); sums to k. Baseline k/E.
--   top1_frequency       tokens whose highest-weight expert is e / N_D; sums to 1. Baseline 1/E.
--   weighted_share       sum of w_e / sum of all weights of D; sums to 1. Baseline 1/E.
-- Source: selection frequency as in router analyses of Mixture-of-Experts models; weighted share is the
--   gate score of ESFT, arXiv 2407.01906.
-- Grain: metric, stack, layer, label, expert; every expert of the layer, 0 when never chosen. n = N_D.
-- Reads: assignments
-- Needs: weights for metric top1_frequency, weighted_share
-- Example: --layer 4 --labels kor_Hang
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
with load as (
    select
        *,
        sum(weight_sum) over (partition by stack, layer, label) as weight_total
    from label_load('assignments', $stack, $layer, $labels, $include_special)
),

metrics as (
    select
        'selection_share' as metric,
        *,
        picks / (top_k * tokens) as value,
        1 / n_experts as baseline
    from load
    union all
    select
        'selection_frequency' as metric,
        *,
        picks / tokens as value,
        top_k / n_experts as baseline
    from load
    union all
    select
        'top1_frequency' as metric,
        *,
        top1 / tokens as value,
        1 / n_experts as baseline
    from load
    union all
    select
        'weighted_share' as metric,
        *,
        weight_sum / nullif(weight_total, 0) as value,
        1 / n_experts as baseline
    from load
)

select
    metric,
    stack,
    layer,
    label,
    expert,
    value,
    baseline,
    tokens as n
from metrics
order by metric, stack, layer, label, expert
