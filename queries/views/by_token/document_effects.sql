-- Question: What did each arm do to the predictions of each group of a document's tokens?
-- Formula: as without groups, from `token_effects`: loss is the change alone, base_loss 0; controls and
--   'no edit' have no rows; decisions and characters are not told by group.
-- Grain: one row per (shard, doc, arm, label).
-- Reads: token_effects, tokens, token_groups
-- Needs: token_effects
select
    tokens.shard,
    tokens.doc,
    token_effects.arm,
    0::usmallint as control,
    'decoder' as stack,
    null::utinyint as layer,
    token_groups.label,
    false as is_special,
    count(*) as tokens,
    sum(token_effects.change::double) as loss,
    0::double as base_loss,
    sum(token_effects.divergence::double) as divergence,
    count(*) filter (where token_effects.flipped) as flips,
    0 as decisions,
    0 as rerouted,
    null::uinteger as characters
from token_effects
inner join tokens using (shard, tok)
inner join token_groups using (shard, tok)
group by tokens.shard, tokens.doc, token_effects.arm, token_groups.label
