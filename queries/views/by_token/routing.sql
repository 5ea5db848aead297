-- Question: What did each router decide about each token, labelled by its group?
-- Grain: one row per (router, token): (shard, stack, layer, tok).
-- Reads: recorded_routing, token_groups
select recorded_routing.* replace (token_groups.label as label)
from recorded_routing
inner join token_groups using (shard, tok)
