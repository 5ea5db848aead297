-- Question: What does the model lose with the experts that hardly any token chooses?
-- Formula: one arm, which drops the dead experts of all layers (query expert_load).
-- Grain: an edit.
-- Reads: expert_load
select
    'dead' as arm,
    stack,
    layer,
    expert,
    'drop' as operation
from expert_load
where is_dead
order by stack, layer, expert
