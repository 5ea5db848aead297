-- Question: Which document of the one run is which of the other?
-- Formula: a document is found again by its id and label; of several that share both, the first is the first,
--   in the order of shards and of the documents in them.
-- Grain: one row per document of either run; the columns of a run are null where only the other has it.
-- Reads: documents, other.documents
with ours as (
    select
        shard,
        doc,
        doc_id,
        label,
        row_number() over (partition by doc_id, label order by shard, doc) as copy
    from documents
),

theirs as (
    select
        shard,
        doc,
        doc_id,
        label,
        row_number() over (partition by doc_id, label order by shard, doc) as copy
    from other.documents
)

select
    doc_id,
    label,
    copy,
    ours.shard,
    ours.doc,
    theirs.shard as other_shard,
    theirs.doc as other_doc
from ours
full join theirs using (doc_id, label, copy)
