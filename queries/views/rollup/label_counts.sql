-- Question: How much of each group of documents did each expert get?
-- Grain: one row per (stack, layer, label, is_special, expert), with zeros for experts never chosen.
-- Reads: document_counts, document_assignments, experts
with present as (
    select distinct
        stack,
        layer,
        label,
        is_special
    from document_counts
),

counted as (
    select
        stack,
        layer,
        label,
        is_special,
        expert,
        picks,
        top1,
        weight_sum
    from document_assignments
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
    sum(weight_sum)::double as weight_sum
from counted
group by stack, layer, label, is_special, expert
