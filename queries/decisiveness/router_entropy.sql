-- Question: How decided is the router about each label's tokens?
-- Formula: p = the router's distribution over its E experts, w = the k weights that the model applied.
--   router_entropy  H(p), nats, 0 … ln E.        Baseline ln E.
--   weight_entropy  H(w / sum w), nats, 0 … ln k. Baseline ln k.
--   topk_mass       sum of p over the k chosen.   Baseline k/E.
--   margin          p of the k-th minus p of the (k+1)-th expert. Baseline 0.
--   The baseline is what a router with p = 1/E everywhere gives. value = mean over N_D tokens.
-- Source: Shannon entropy; router_entropy, topk_mass and margin are recorded while the model runs.
-- Grain: metric, stack, layer, label. n = N_D, the tokens of the label.
-- Reads: label_statistics, layers
-- Needs: entropy for metric router_entropy; weights for metric weight_entropy; topk_mass for metric
--   topk_mass; margin for metric margin
-- Example: --layer 4 --labels kor_Hang
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
with summed as (
    select *
    from label_sums('label_statistics', $stack, $layer, $labels, $include_special)
),

located as (
    select
        summed.*,
        layers.n_experts,
        layers.top_k
    from summed
    inner join layers using (stack, layer)
),

metrics as (
    select
        'router_entropy' as metric,
        *,
        router_entropy / n as value,
        ln(n_experts) as baseline
    from located
    union all
    select
        'weight_entropy' as metric,
        *,
        weight_entropy / n as value,
        ln(top_k) as baseline
    from located
    union all
    select
        'topk_mass' as metric,
        *,
        topk_mass / n as value,
        top_k / n_experts as baseline
    from located
    union all
    select
        'margin' as metric,
        *,
        margin / n as value,
        0 as baseline
    from located
)

select
    metric,
    stack,
    layer,
    label,
    value,
    baseline,
    n
from metrics
order by metric, stack, layer, label
