-- Question: Why is there no purity, or no row?
-- Reads: labelled_tokens, layers
with known as (
    select
        count(*) as tokens,
        count(token_id) as ids
    from labelled_tokens
),

stacks as (
    select count(*) as layers
    from layers
    where $stack is null or stack = $stack
    group by stack
)

select 'the run holds no token ids, which purity needs: collect with --token-ids keep or hash' as remark
from known
where tokens > 0 and ids = 0
union all
select format('no stack has the {} layers of a path', $n) as remark
from stacks
having max(layers) < $n
