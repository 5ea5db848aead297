-- Question: Which experts are there?
-- Grain: one row per (stack, layer, expert), chosen or not.
-- Reads: layers
select
    stack,
    layer,
    n_experts,
    top_k,
    unnest(range(n_experts))::integer as expert
from layers
