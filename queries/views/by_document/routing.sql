-- Question: What did each router decide about each token, labelled by the group of its document?
-- Grain: one row per (router, token): (shard, stack, layer, tok).
-- Reads: recorded_routing, tokens, document_groups
with labelled as (
    select
        tokens.shard,
        tokens.tok,
        document_groups.label
    from tokens
    inner join document_groups using (shard, doc)
)

select recorded_routing.* replace (labelled.label as label)
from recorded_routing
inner join labelled using (shard, tok)
