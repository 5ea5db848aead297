-- Question: Which shards are there, and how many documents in each?
-- Grain: one row per shard with a document.
-- Reads: documents
select
    shard,
    count(*) as documents
from documents
group by shard
