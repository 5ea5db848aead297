-- Question: How long is the document?
-- Formula: tokens of its text, special tokens included, in buckets 1, 2-3, 4-7, 8-15 … with leading zeros.
-- Groups: documents
-- Reads: recorded_documents
with buckets as (
    select
        shard,
        doc,
        if(tokens = 0, 0, 2 ** floor(log2(tokens)))::bigint as least
    from recorded_documents
)

select
    shard,
    doc,
    if(least < 2, format('{:06d}', least), format('{:06d}-{:06d}', least, 2 * least - 1)) as label
from buckets
