-- Question: Which labels are there, and how much text of each?
-- Grain: one row per label.
-- Reads: documents
select
    label,
    count(*) as documents,
    sum(tokens)::bigint as tokens,
    sum(characters)::bigint as characters
from documents
group by label
