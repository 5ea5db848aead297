-- Question: Which documents are there, labelled by their groups?
-- Grain: one row per document, (shard, doc).
-- Reads: recorded_documents, document_groups
select recorded_documents.* replace (document_groups.label as label)
from recorded_documents
inner join document_groups using (shard, doc)
