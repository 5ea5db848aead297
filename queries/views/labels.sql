-- Question: Which labels are there, and how much text of each?
-- Formula: a document with several labels counts for each.
-- Grain: one row per label.
-- Reads: documents, label_sets
select
    coalesce(label_sets.label, documents.label) as label,
    count(*) as documents,
    sum(documents.tokens)::bigint as tokens,
    sum(documents.characters)::bigint as characters
from documents
left join label_sets on documents.label = label_sets.label_set
group by coalesce(label_sets.label, documents.label)
