-- Question: How did each router treat each document?
-- Formula: tokens = T, the document's tokens there. Over these tokens: experts = those chosen at all, by
--   number; picks, top1, weight_sums, in their order: times each was chosen, dropped or not; times it had
--   the highest weight; sum of its weights (the last two null without weights). router_entropy,
--   weight_entropy, topk_mass and margin are sums of those of `decisions`; dropped_picks too, and
--   dropped_tokens = tokens with at least one dropped pick.
-- Grain: one row per (shard, doc, stack, layer, label, is_special). A document has one label, unless labels
--   are groups of tokens.
-- Reads: decisions, tokens
with placed as (
    select
        decisions.*,
        tokens.doc
    from decisions
    inner join tokens using (shard, tok)
),

picked as (
    select
        * exclude (experts, weights),
        experts[1] as first_pick,
        unnest(experts) as pick,
        unnest(weights) as weight
    from placed
),

-- a token has one first pick: what is true of the token is counted there
counted as (
    select
        shard,
        doc,
        stack,
        layer,
        label,
        is_special,
        pick,
        count(*) as picks,
        sum((pick = expert)::integer) as top1,
        sum(weight) as weight_sum,
        count_if(pick = first_pick) as tokens,
        sum(router_entropy) filter (where pick = first_pick) as router_entropy,
        sum(weight_entropy) filter (where pick = first_pick) as weight_entropy,
        sum(topk_mass) filter (where pick = first_pick) as topk_mass,
        sum(margin) filter (where pick = first_pick) as margin,
        sum(dropped_picks) filter (where pick = first_pick) as dropped_picks,
        count_if(pick = first_pick and dropped_picks > 0) as dropped_tokens
    from picked
    where pick is not null
    group by shard, doc, stack, layer, label, is_special, pick
)

select
    shard,
    doc,
    stack,
    layer,
    label,
    is_special,
    sum(tokens)::uinteger as tokens,
    sum(router_entropy)::float as router_entropy,
    sum(weight_entropy)::float as weight_entropy,
    sum(topk_mass)::float as topk_mass,
    sum(margin)::float as margin,
    sum(dropped_picks)::uinteger as dropped_picks,
    sum(dropped_tokens)::uinteger as dropped_tokens,
    list(pick::usmallint order by pick) as experts,
    list(picks::uinteger order by pick) as picks,
    list(top1::uinteger order by pick) as top1,
    list(weight_sum::float order by pick) as weight_sums
from counted
group by shard, doc, stack, layer, label, is_special
