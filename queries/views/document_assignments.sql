-- Question: How much of each document did each expert get?
-- Formula: picks = times the expert was chosen, dropped or not; top1 = tokens whose highest-weight expert it
--   is; weight_sum = sum of its weights; tokens = the document's, the same in all rows of a group.
-- Grain: one row per (shard, doc, stack, layer, label, is_special, expert), for experts that were chosen.
-- Reads: document_counts
select
    shard,
    doc,
    stack,
    layer,
    label,
    is_special,
    unnest(experts)::integer as expert,
    tokens,
    unnest(picks) as picks,
    unnest(top1) as top1,
    unnest(weight_sums) as weight_sum
from document_counts
