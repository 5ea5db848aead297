-- Question: How many of the next token's experts does a small cache hold, by label?
-- Formula: each layer has a cache of the experts that it used last, cache of them (LRU), empty at the start of
--   a document. A token looks up its k experts at once, then they are the last used, among them the later in
--   the model's own order. value = hits / picks: an expert is a hit if fewer than cache others were used since
--   its last use. Tokens that are left out do not touch the cache.
--   Baseline the same with the tokens of each document in a random order: what the document's favourite experts
--   give, without neighbours that are alike. The first warm_up tokens of a document, in either order, fill the
--   cache and do not count.
-- Source: LRU caches for expert offloading, arXiv 2312.17238; that caches of about 2 k experts pay, arXiv
--   2505.16056.
-- Grain: metric, stack, layer, label. n = picks that count. new = share of picks whose expert the document had
--   not used before, in which no cache can have it. cache = experts held. Where labels are groups of tokens the
--   cache sees the whole document, and each group counts its own tokens.
-- Reads: cache_hits
-- Example: --layer 4 --labels eng_Latn,kor_Hang
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
--   cache integer >= 1 = null: experts that the cache of a layer holds (default: 2 k)
--   warm_up integer >= 0 = 1: tokens at the start of a document that are not counted
--   seed integer >= 0 = 0: of the random orders
with counted as (
    select *
    from by_label('cache_hits', $stack, $layer, $labels, $include_special, false)
    where
        asked_cache is not distinct from $cache
        and warm_up = $warm_up
        and seed = $seed
)

select
    'cache_hit_rate' as metric,
    stack,
    layer,
    label,
    sum(hits) / sum(picks) as value,
    sum(shuffled_hits) / nullif(sum(shuffled_picks), 0) as baseline,
    sum(picks)::bigint as n,
    sum(first_uses) / sum(picks) as new,
    any_value(cache) as cache
from counted
group by stack, layer, label
having sum(picks) > 0
order by metric, stack, layer, label
