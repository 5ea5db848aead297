-- Question: Which experts did each label's tokens choose, counted token by token?
-- Formula: picks, top1 and weight_sum are those of `assignments`; the last two are null without weights.
-- Grain: one row per (stack, layer, label, is_special, expert), for experts that were chosen.
-- Reads: decisions
with picked as (
    select
        stack,
        layer,
        label,
        is_special,
        expert as top_expert,
        unnest(experts) as expert,
        unnest(weights) as weight
    from decisions
)

select
    stack,
    layer,
    label,
    is_special,
    expert::integer as expert,
    count(*) as picks,
    sum((expert = top_expert)::integer)::bigint as top1,
    sum(weight) as weight_sum
from picked
where expert is not null
group by stack, layer, label, is_special, expert
