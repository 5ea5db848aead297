-- Question: How much of each label's text did each expert get?
-- Formula: picks = N_eD, dropped or not; top1 = tokens whose highest-weight expert is e;
--   weight_sum = sum of w_e; tokens = N_D, the same in all rows of a group.
-- Grain: one row per (stack, layer, label, is_special, expert), with zeros for experts never chosen.
-- Reads: label_counts, experts
with counted as (
    select *
    from label_counts
),

present as (
    select
        stack,
        layer,
        label,
        is_special,
        -- a token has one highest-weight expert
        sum(top1)::bigint as tokens
    from counted
    group by stack, layer, label, is_special
)

select
    present.stack,
    present.layer,
    present.label,
    present.is_special,
    experts.expert,
    experts.n_experts,
    experts.top_k,
    present.tokens,
    coalesce(counted.picks, 0) as picks,
    coalesce(counted.top1, 0) as top1,
    coalesce(counted.weight_sum, 0) as weight_sum
from present
inner join experts using (stack, layer)
left join counted
    on
        present.stack = counted.stack
        and present.layer = counted.layer
        and present.label = counted.label
        and present.is_special = counted.is_special
        and experts.expert = counted.expert
