-- Question: What did each arm of edits, and each control, do to the model's predictions of each document?
-- Formula: tokens = those with a prediction, special ones apart; loss, base_loss = sums of their losses with
--   the edits and without, in nats; divergence = sum of KL(without‖with) of the next token's distribution;
--   flips = tokens whose most probable successor is another one; decisions = those of routers behind the
--   first edited layer, and rerouted = those with other experts. characters = those of a document that was
--   not cut, else null.
--   control: 0 for the arm itself, its controls count from 1. The arm 'no edit' is the model as it is, with
--   the documents in other batches.
-- Grain: one row per (shard, doc, arm, control). stack = decoder; layer is null: an arm may edit several.
-- Reads: effects, documents
-- Needs: effects
-- Groups: documents
select
    effects.shard,
    effects.doc,
    effects.arm,
    effects.control,
    'decoder' as stack,
    null::utinyint as layer,
    documents.label,
    false as is_special,
    effects.tokens,
    effects.loss,
    effects.base_loss,
    effects.divergence,
    effects.flips,
    effects.decisions,
    effects.rerouted,
    if(documents.truncated, null, documents.characters) as characters
from effects
inner join documents using (shard, doc)
