-- Question: How many of the next token's experts does a small cache of each layer hold?
-- Formula: value = hits / picks. A layer's cache holds the experts that it used last (LRU), and is empty when
--   a document begins. A token looks up its k experts at once: one is a hit if fewer than `cache` others were
--   used since its last use. Then they count as used, in the model's own order. Tokens that are left out do
--   not touch the cache. The first warm_up tokens of a document fill it and are not counted; the first use of
--   an expert after them is a miss like any other.
--   Baseline: the tokens of each document in a random order, so that only the document's favourite experts
--   help, and not that neighbouring tokens are alike.
-- Source: LRU caches of experts for offloading, arXiv 2312.17238; caches of about 2 k experts as a good size,
--   arXiv 2505.16056.
-- Grain: metric, stack, layer, label. n = picks that are counted; new = share of them whose expert the
--   document had not used before, which are misses in a cache of any size; cache = experts held. Where labels
--   are groups of tokens, the cache sees the whole document and each group counts its own tokens.
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
