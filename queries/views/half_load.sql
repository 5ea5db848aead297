-- Question: How much of each half of each label's documents did each expert get?
-- Formula: picks = times the expert was chosen in these documents, dropped or not; over all experts they sum
--   to k times the tokens.
-- Grain: one row per (stack, layer, label, is_special, is_first, expert), for experts that were chosen.
-- Reads: document_assignments, halves
select
    document_assignments.stack,
    document_assignments.layer,
    document_assignments.label,
    document_assignments.is_special,
    halves.is_first,
    document_assignments.expert,
    sum(document_assignments.picks)::bigint as picks
from document_assignments
inner join halves using (shard, doc)
group by
    document_assignments.stack,
    document_assignments.layer,
    document_assignments.label,
    document_assignments.is_special,
    halves.is_first,
    document_assignments.expert
