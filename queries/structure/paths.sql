-- Question: Which paths do tokens take through the experts of consecutive layers, and with which token ids?
-- Formula: a path is a token's top-1 experts e_1, e_2 … e_n at n consecutive recorded layers of a stack, a
--   window of layers; N_p tokens take path p, N_px of them with token id x.
--   path_share     value = N_p / N, of the most frequent paths. Baseline: a Markov chain, in which an expert
--     depends on that of the layer before alone, P(e_1) P(e_2 given e_1) P(e_3 given e_2) …, with the shares
--     of layer_transition. For two layers it equals the value.
--   same_path      chance that two tokens take the same path: sum of N_p (N_p - 1) / (N (N - 1)). Baseline
--     that of two draws from the chain, the sum of its squared shares.
--   path_purity    chance that another token of the same path has the same id: per path, sum over x of
--     N_px (N_px - 1) / (N_p (N_p - 1)), averaged over the tokens whose path has another one. Baseline: ids
--     shuffled over tokens, sum of N_x (N_x - 1) / (N (N - 1)).
--   expert_purity  the same with each layer's experts in place of paths, averaged over the window's layers.
--     How far path_purity exceeds it is what combining layers adds.
-- Source: expert paths as in arXiv 2603.18297 and arXiv 2604.17837; purity is Simpson's index (1949, Nature
--   163, 688), whose expectation is the same for small paths as for large ones.
-- Grain: metric, stack, layer (the window's first), rank; null for a whole window, and paths from 1. n = N,
--   tokens of all labels together; for path_purity those that are averaged over. count = N_p, for a whole
--   window the number of its paths. path = the experts. Of a path, purity is as above, token its most
--   frequent id and token_share that id's share. No purity and no token where the run dropped its token ids.
-- Reads: path_counts, vocab
-- Needs: weights
-- Example: --layer 4 --top 3
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only the window that starts at this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
--   n integer >= 2 = 3: layers of a window
--   top integer >= 1 = 10: paths of each window
with counted as (
    select *
    from path_counts
    where
        layers = $n
        and labels is not distinct from $labels
        and include_special = $include_special
        and ($stack is null or stack = $stack)
        and ($layer is null or layer = $layer)
        and (rank is null or rank <= $top)
),

metrics as (
    select
        'path_share' as metric,
        *,
        share as value,
        markov_share as baseline,
        all_tokens as n,
        tokens as count
    from counted
    where rank is not null
    union all
    select
        'same_path' as metric,
        *,
        same_path as value,
        same_markov as baseline,
        all_tokens as n,
        paths as count
    from counted
    where same_path is not null
    union all
    select
        'path_purity' as metric,
        *,
        purity as value,
        all_purity as baseline,
        tokens as n,
        paths as count
    from counted
    where rank is null and purity is not null
    union all
    select
        'expert_purity' as metric,
        *,
        expert_purity as value,
        all_purity as baseline,
        all_tokens as n,
        paths as count
    from counted
    where expert_purity is not null
)

select
    metrics.metric,
    metrics.stack,
    metrics.layer,
    metrics.rank,
    metrics.path,
    metrics.value,
    metrics.baseline,
    metrics.n,
    metrics.count,
    if(metrics.rank is null, null, metrics.purity) as purity,
    coalesce(vocab.token, metrics.token_id::varchar) as token,
    metrics.token_share
from metrics
left join vocab on metrics.token_id = vocab.token_id
order by metrics.metric, metrics.stack, metrics.layer, metrics.rank
