-- Question: Which labels are served by no placement?
-- Reads: document_labels, halves
with chosen as (
    select *
    from document_labels
    where $labels is null or list_contains($labels, label)
),

measured as (
    select
        chosen.label,
        count(*) filter (where not halves.is_first) as documents
    from chosen
    inner join halves using (shard, doc)
    group by chosen.label
)

select
    count(*) || ' labels have no document apart from those that place their experts, first '
    || min(label) || ': collect more of them' as remark
from measured
where documents = 0
having count(*) > 0
