-- Question: How many of a token's experts does the other run choose too?
-- Formula: experts that both runs chose for a token / k, mean over N_D tokens: 1 where nothing differs.
--   Baseline k/E, two routers that choose at random.
-- Source: OLMoE, arXiv 2409.02060, section 5 (router saturation: a checkpoint against the last one).
-- Grain: metric, stack, layer, label (null if pooled). n = N_D, tokens.
-- Reads: aligned_decisions, layers
-- Example: --layer 4 --labels eng_Latn,kor_Hang
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
--   pooled boolean = false: all labels together, in one row, instead of label by label
with chosen as (
    select *
    from by_label('aligned_decisions', $stack, $layer, $labels, $include_special, $pooled)
),

measured as (
    select
        stack,
        layer,
        label,
        avg(shared) as mean_shared,
        count(*) as n
    from chosen
    group by stack, layer, label
)

select
    'router_saturation' as metric,
    measured.stack,
    measured.layer,
    measured.label,
    measured.mean_shared / layers.top_k as value,
    layers.top_k / layers.n_experts as baseline,
    measured.n
from measured
inner join layers using (stack, layer)
order by metric, measured.stack, measured.layer, measured.label
