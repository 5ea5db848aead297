-- Question: What did the same router of two runs decide about the same token?
-- Formula: decisions of each run; shared = experts that both chose.
-- Grain: one row per (router, token), (shard, stack, layer, tok), of routers that both runs recorded.
-- Reads: decisions, other.decisions, aligned_tokens
select
    ours.shard,
    ours.stack,
    ours.layer,
    ours.tok,
    ours.label,
    ours.is_special,
    ours.expert,
    theirs.expert as other_expert,
    ours.experts,
    theirs.experts as other_experts,
    len(list_intersect(ours.experts, theirs.experts)) as shared,
    ours.weights,
    theirs.weights as other_weights,
    ours.margin,
    theirs.margin as other_margin
from decisions as ours
inner join aligned_tokens using (shard, tok)
inner join other.decisions as theirs
    on
        aligned_tokens.other_shard = theirs.shard
        and aligned_tokens.other_tok = theirs.tok
        and ours.stack = theirs.stack
        and ours.layer = theirs.layer
