-- Question: Why is there no row?
-- Reads: arms
with dropped as (
    select
        arm,
        any_value(stack) as stack,
        any_value(layer) as layer
    from arms
    where control = 0
    group by arm
    having
        count(*) = 1
        and any_value(operation) = 'drop'
        and count(label) + count(token_class) + count(position) = 0
)

select
    'no layer has two arms that drop a single expert everywhere, which are compared here: '
    || '--arms every_expert makes one for each expert' as remark
where not exists (
    select 1
    from dropped
    group by stack, layer
    having count(*) > 1
)
