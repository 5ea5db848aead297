-- Question: How decided was each router about each label's tokens, and how many of them did it drop?
-- Formula: tokens = N_D. Over these tokens: router_entropy, weight_entropy, topk_mass, margin and
--   dropped_picks are sums of those of `decisions`; dropped_tokens = tokens with at least one dropped pick.
-- Grain: one row per (stack, layer, label, is_special) that has any.
-- Reads: decisions
select
    stack,
    layer,
    label,
    is_special,
    count(*) as tokens,
    sum(router_entropy::double) as router_entropy,
    sum(weight_entropy) as weight_entropy,
    sum(topk_mass::double) as topk_mass,
    sum(margin::double) as margin,
    sum(dropped_picks)::bigint as dropped_picks,
    count_if(dropped_picks > 0)::bigint as dropped_tokens
from decisions
group by stack, layer, label, is_special
