-- Question: Why are there no deciles?
-- Reads: decisions
with any_decision as (
    select
        margin,
        weights
    from decisions
    limit 1 -- noqa: AM09
)

select format('no deciles: the first run has not what --by {} takes; name the other run first', $by) as remark
from any_decision
where margin is null and ($by = 'margin' or weights is null)
