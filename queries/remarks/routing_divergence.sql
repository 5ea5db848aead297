-- Question: Why is there no row, and what became of texts that a label has twice?
-- Reads: documents
with texts as (
    select
        parallel_id,
        label,
        count(*) as documents
    from documents
    where parallel_id is not null
    group by parallel_id, label
),

sentences as (
    select
        parallel_id,
        count(*) as labels,
        count_if(documents > 1) as repeated
    from texts
    group by parallel_id
),

summed as (
    select
        count(*) as sentences,
        count_if(labels > 1) as shared,
        coalesce(sum(repeated), 0)::bigint as repeated
    from sentences
)

select 'no document has a parallel_id: collect with --parallel-column' as remark
from summed
where sentences = 0
union all
select 'no parallel_id is shared by two labels, so there is nothing to compare' as remark
from summed
where sentences > 0 and shared = 0
union all
select format('{} times documents of a label share a parallel_id; they count as one', repeated) as remark
from summed
where repeated > 0
