-- Question: Which tokens does the output of each chosen expert promote, at each sampled token?
-- Formula: first, second, third = ids of the tokens whose logits the output raises most, through the final
--   norm and the output embedding. attribution = how much more it raises the logit of the token that came
--   next than those of the vocabulary on average, times the routing weight; null for the last token of a
--   document.
-- Grain: one row per (shard, stack, layer, tok, expert) of the sample.
-- Reads: promotions, labelled_tokens
-- Needs: promotions
select
    promotions.shard,
    promotions.stack,
    promotions.layer,
    promotions.tok,
    promotions.expert::integer as expert,
    promotions.first,
    promotions.second,
    promotions.third,
    promotions.attribution,
    labelled_tokens.doc,
    labelled_tokens.label,
    labelled_tokens.is_special
from promotions
inner join labelled_tokens using (shard, tok)
