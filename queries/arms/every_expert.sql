-- Question: What does the model lose with each expert alone?
-- Formula: an arm for each expert, which drops it.
-- Grain: an edit.
-- Reads: experts
select
    stack || ' ' || layer || ' ' || expert as arm,
    stack,
    layer,
    expert,
    'drop' as operation
from experts
order by stack, layer, expert
