-- Question: What does each label lose with the two experts of each layer that are most its own?
-- Formula: an arm for each label, named after it, which drops two experts of each layer: those with the
--   largest f ln(f / mean f), where f = the share of the label's tokens that choose the expert and mean f is
--   over the labels, each with equal weight.
-- Grain: an edit.
-- Reads: assignments
with shares as (
    select
        stack,
        layer,
        label,
        expert,
        sum(picks) / sum(tokens) as share
    from assignments
    where not is_special
    group by stack, layer, label, expert
),

compared as (
    select
        *,
        avg(share) over (partition by stack, layer, expert) as mean_share
    from shares
)

select
    label as arm,
    stack,
    layer,
    expert,
    'drop' as operation
from compared
where share > 0
qualify
    row_number() over (
        partition by stack, layer, label
        order by share * ln(share / mean_share) desc, expert asc
    ) <= 2
order by label, stack, layer, expert
