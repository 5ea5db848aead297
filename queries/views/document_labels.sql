-- Question: Which labels does each document have?
-- Grain: one row per document and label, (shard, doc, label).
-- Reads: documents, label_sets
select
    documents.shard,
    documents.doc,
    coalesce(label_sets.label, documents.label) as label
from documents
left join label_sets on documents.label = label_sets.label_set
