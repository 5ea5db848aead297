-- Question: Which labels are served by no placement?
-- Reads: document_labels, halves
with measured as (
    select
        document_labels.label,
        count(*) filter (where not halves.is_first) as documents
    from document_labels
    inner join halves using (shard, doc)
    where $labels is null or list_contains($labels, document_labels.label)
    group by document_labels.label
)

select
    count(*) || ' labels have no document apart from those that place their experts, first '
    || min(label) || ': collect more of them' as remark
from measured
where documents = 0
having count(*) > 0
