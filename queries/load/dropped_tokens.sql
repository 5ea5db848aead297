-- Question: How many of each label's tokens does a capacity limit keep from an expert that they chose?
-- Formula: dropped_tokens  tokens with at least one dropped pick / N_D.
--   dropped_picks   dropped picks / (k N_D), of all picks of D.
--   Baseline 0, no limit; both are 0 for a router without one. A dropped pick still counts as chosen in
--   all other queries.
-- Source: expert capacity as in Switch Transformers, arXiv 2101.03961, section 2.2.
-- Grain: metric, stack, layer, label. n = N_D, the tokens of the label.
-- Reads: label_statistics, layers
-- Example: --layer 4 --labels eng_Latn,kor_Hang
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
        layers.top_k
    from summed
    inner join layers using (stack, layer)
),

metrics as (
    select
        'dropped_tokens' as metric,
        *,
        dropped_tokens / n as value,
        dropped_tokens::bigint as count
    from located
    union all
    select
        'dropped_picks' as metric,
        *,
        dropped_picks / (top_k * n) as value,
        dropped_picks::bigint as count
    from located
)

select
    metric,
    stack,
    layer,
    label,
    value,
    0 as baseline,
    n,
    count
from metrics
order by metric, stack, layer, label
