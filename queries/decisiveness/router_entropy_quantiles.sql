-- Question: How decided is the router about most of a label's tokens, and how far do tokens differ in it?
-- Formula: value = the median, first_quartile and third_quartile of the metrics of router_entropy over N_D
--   tokens: router_entropy, weight_entropy, topk_mass, margin. Between two tokens linear, as numpy.quantile.
--   Baseline as there, what a router with p = 1/E everywhere gives: ln E, ln k, k/E, 0.
--   Tokens are counted by value first, and values are few: router_entropy, topk_mass and margin are recorded
--   with 12 significant bits, to a part in 4,000, and weight_entropy is rounded to as many here.
-- Source: Hyndman and Fan 1996, "Sample Quantiles in Statistical Packages", definition 7.
-- Grain: metric, stack, layer, label. n = N_D, the tokens of the label.
-- Reads: decisions, layers
-- Needs: entropy for metric router_entropy; weights for metric weight_entropy; topk_mass for metric
--   topk_mass; margin for metric margin
-- Example: --layer 4 --labels kor_Hang
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
with chosen as (
    select
        *,
        -- the last of its 12
        if(weight_entropy = 0, 1, pow(2, floor(log2(abs(weight_entropy))) - 11)) as bit
    from by_label('decisions', $stack, $layer, $labels, $include_special, false)
),

measured as (
    select
        stack,
        layer,
        label,
        router_entropy::double as router_entropy,
        round(weight_entropy / bit) * bit as weight_entropy,
        topk_mass::double as topk_mass,
        margin::double as margin
    from chosen
),

-- of the four one is grouped by at a time, and the others are null
counted as (
    select
        stack,
        layer,
        label,
        case
            when grouping(router_entropy) = 0 then 'router_entropy'
            when grouping(weight_entropy) = 0 then 'weight_entropy'
            when grouping(topk_mass) = 0 then 'topk_mass'
            else 'margin'
        end as metric,
        coalesce(router_entropy, weight_entropy, topk_mass, margin) as value,
        count(*) as tokens
    from measured
    group by grouping sets (
        (stack, layer, label, router_entropy),
        (stack, layer, label, weight_entropy),
        (stack, layer, label, topk_mass),
        (stack, layer, label, margin)
    )
),

-- the tokens of a value have the places before, before + 1, … of 0 … n - 1
placed as (
    select
        *,
        sum(tokens) over (partition by metric, stack, layer, label)::bigint as n,
        sum(tokens) over (partition by metric, stack, layer, label order by value)::bigint - tokens as before
    from counted
),

quarters as (
    select unnest([1, 2, 3]) as quarter
),

-- the quantile is at quarter (n - 1) / 4: on a place, or some way beyond one towards the next
neighbours as (
    select
        placed.metric,
        placed.stack,
        placed.layer,
        placed.label,
        placed.n,
        quarters.quarter,
        (quarters.quarter * (placed.n - 1) % 4) / 4 as beyond,
        max(placed.value) filter (where 4 * placed.before <= quarters.quarter * (placed.n - 1)) as this,
        max(placed.value) filter (where 4 * (placed.before - 1) < quarters.quarter * (placed.n - 1)) as next
    from placed
    cross join quarters
    group by placed.metric, placed.stack, placed.layer, placed.label, placed.n, quarters.quarter
),

quantiles as (
    select
        metric,
        stack,
        layer,
        label,
        n,
        max(this + beyond * (next - this)) filter (where quarter = 1) as first_quartile,
        max(this + beyond * (next - this)) filter (where quarter = 2) as median,
        max(this + beyond * (next - this)) filter (where quarter = 3) as third_quartile
    from neighbours
    group by metric, stack, layer, label, n
)

select
    quantiles.metric,
    quantiles.stack,
    quantiles.layer,
    quantiles.label,
    quantiles.median as value,
    case quantiles.metric
        when 'router_entropy' then ln(layers.n_experts)
        when 'weight_entropy' then ln(layers.top_k)
        when 'topk_mass' then layers.top_k / layers.n_experts
        else 0
    end as baseline,
    quantiles.n,
    quantiles.first_quartile,
    quantiles.third_quartile
from quantiles
inner join layers using (stack, layer)
order by quantiles.metric, quantiles.stack, quantiles.layer, quantiles.label
