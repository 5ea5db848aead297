-- Question: Which experts did each group of documents choose, by the counts of documents?
-- Grain: one row per (stack, layer, label, is_special, expert), for experts that were chosen.
-- Reads: document_assignments
select
    stack,
    layer,
    label,
    is_special,
    expert,
    sum(picks)::bigint as picks,
    sum(top1)::bigint as top1,
    sum(weight_sum) as weight_sum
from document_assignments
group by stack, layer, label, is_special, expert
