-- Question: How did each router treat each document, as counted once?
-- Grain: one row per (shard, doc, stack, layer, label, is_special).
-- Reads: document_rollup, documents
select
    document_rollup.shard,
    document_rollup.doc,
    document_rollup.stack,
    document_rollup.layer,
    documents.label,
    document_rollup.is_special,
    document_rollup.tokens,
    document_rollup.router_entropy,
    document_rollup.weight_entropy,
    document_rollup.topk_mass,
    document_rollup.margin,
    document_rollup.dropped_picks,
    document_rollup.dropped_tokens,
    document_rollup.experts,
    document_rollup.picks,
    document_rollup.top1,
    document_rollup.weight_sums
from document_rollup
inner join documents using (shard, doc)
