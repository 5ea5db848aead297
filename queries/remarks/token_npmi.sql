-- Question: Why is there no row?
-- Reads: labelled_tokens
with known as (
    select count(token_id) as ids
    from labelled_tokens
)

select 'the run holds no token ids, which this query needs: collect with --token-ids keep or hash' as remark
from known
where ids = 0
