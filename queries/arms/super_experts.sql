-- Question: What does the model lose with the few experts that put out extreme activations?
-- Formula: one arm, which drops the super experts of all layers (query super_experts).
-- Grain: an edit.
-- Reads: super_experts
select
    'super experts' as arm,
    stack,
    layer,
    expert,
    'drop' as operation
from super_experts
where is_super
order by stack, layer, expert
