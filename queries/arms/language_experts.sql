-- Question: What does each label lose with the two experts of each layer that are most its own?
-- Formula: an arm for each label, named after it, which drops two experts of each layer: of those that the
--   label chooses significantly more than the other documents do, at a false discovery rate of 0.05, those
--   with the largest lift. A layer without such experts keeps all.
-- Grain: an edit.
-- Reads: specialization_test
select
    label as arm,
    stack,
    layer,
    expert,
    'drop' as operation
from specialization_test
where significant
qualify row_number() over (partition by stack, layer, label order by lift desc, expert asc) <= 2
order by label, stack, layer, expert
