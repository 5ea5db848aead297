-- Question: How much of each label's text did each expert get, token by token?
-- Formula: those of `assignments`, which adds what follows from them.
-- Grain: one row per (stack, layer, label, is_special, expert), with zeros for experts never chosen.
-- Reads: selections, decisions, routing, experts
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
)

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
