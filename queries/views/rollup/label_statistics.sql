-- Question: How decided was each router about each label's tokens, by the sums over documents?
-- Grain: one row per (stack, layer, label, is_special) that has any.
-- Reads: document_counts
select
    stack,
    layer,
    label,
    is_special,
    sum(tokens)::bigint as tokens,
    sum(router_entropy::double) as router_entropy,
    sum(weight_entropy::double) as weight_entropy,
    sum(topk_mass::double) as topk_mass,
    sum(margin::double) as margin,
    sum(dropped_picks)::bigint as dropped_picks,
    sum(dropped_tokens)::bigint as dropped_tokens
from document_counts
group by stack, layer, label, is_special
