-- Question: Which documents does an id name?
-- Reads: documents
with named as (
    select
        shard,
        doc
    from documents
    where
        doc_id = $document
        and ($shard is null or shard = $shard)
        and ($doc is null or doc = $doc)
),

summed as (
    select
        count(*) as documents,
        string_agg(format('{}/{}', shard, doc), ', ' order by shard, doc) as places
    from named
)

select format('no document has the id {}', $document) as remark
from summed
where $document is not null and documents = 0
union all
select
    format(
        'the id {} names {} documents, shard/doc {}: the first is shown; choose with --shard and --doc',
        $document, documents, places
    ) as remark
from summed
where documents > 1
