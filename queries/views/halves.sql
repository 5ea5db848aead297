-- Question: In which half of its label's documents is each document?
-- Formula: every other document of each label, in the order of the run, is in the first half. One with
--   several labels counts as one of that set of labels.
-- Grain: one row per document, (shard, doc).
-- Reads: documents
select
    shard,
    doc,
    row_number() over (partition by label order by shard, doc) % 2 = 1 as is_first
from documents
