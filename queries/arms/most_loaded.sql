-- Question: What does the model lose with the experts that it chooses most?
-- Formula: one arm, which drops the expert of each layer that most tokens choose; ties go to the lower id.
-- Grain: an edit.
-- Reads: assignments
select
    'most loaded' as arm,
    stack,
    layer,
    expert,
    'drop' as operation
from assignments
where not is_special
group by stack, layer, expert
qualify row_number() over (partition by stack, layer order by sum(picks) desc, expert asc) = 1
order by stack, layer
