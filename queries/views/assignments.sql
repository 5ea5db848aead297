-- Question: How much of each label's text did each expert get?
-- Formula: picks = N_eD, dropped or not; top1 = tokens whose highest-weight expert is e;
--   weight_sum = sum of w_e; tokens = N_D, the same in all rows of a group.
-- Grain: one row per (stack, layer, label, is_special, expert), with zeros for experts never chosen.
-- Reads: selections, decisions, routing, experts, layers
with present as (
    select distinct
        stack,
        layer,
        label,
        is_special
    from routing
),

-- a union, because conditions on its keys reach the files through it; through joins they would not
counted as (
    select
        stack,
        layer,
        label,
        is_special,
        expert,
        count(*) as picks,
        0 as top1,
        sum(weight) as weight_sum
    from selections
    group by stack, layer, label, is_special, expert
    union all
    select
        stack,
        layer,
        label,
        is_special,
        expert,
        0 as picks,
        count(*) as top1,
        0 as weight_sum
    from decisions
    group by stack, layer, label, is_special, expert
    union all
    select
        present.stack,
        present.layer,
        present.label,
        present.is_special,
        experts.expert,
        0 as picks,
        0 as top1,
        0 as weight_sum
    from present
    inner join experts using (stack, layer)
),

summed as (
    select
        stack,
        layer,
        label,
        is_special,
        expert,
        sum(picks)::bigint as picks,
        sum(top1)::bigint as top1,
        sum(weight_sum) as weight_sum
    from counted
    group by stack, layer, label, is_special, expert
)

select
    summed.stack,
    summed.layer,
    summed.label,
    summed.is_special,
    summed.expert,
    layers.n_experts,
    layers.top_k,
    -- a token has one highest-weight expert
    (sum(summed.top1) over (
        partition by summed.stack, summed.layer, summed.label, summed.is_special
    ))::bigint as tokens,
    summed.picks,
    summed.top1,
    summed.weight_sum
from summed
inner join layers using (stack, layer)
