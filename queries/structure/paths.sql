-- Question: Which paths do tokens take through the experts of consecutive layers, and do they share token ids?
-- Formula: a path = a token's top-1 experts at n consecutive recorded layers of a stack, a window.
--   path_share     the n most frequent paths: value = N_p / N. Baseline the share that a Markov chain gives, in
--     which a layer's expert depends on the one before alone: P(e_1) P(e_2 given e_1) P(e_3 given e_2) …, with
--     the shares of layer_transition; for two layers it is the value.
--   same_path      chance that two tokens take the same path, sum of N_p (N_p - 1) / (N (N - 1)). Baseline that
--     of two draws from the chain, sum of its squared shares.
--   path_purity    chance that another token of the same path has the same id: sum over the ids x of
--     N_px (N_px - 1) / (N_p (N_p - 1)), averaged over the tokens whose path has another one. Baseline the
--     same where ids are shuffled, sum of N_x (N_x - 1) / (N (N - 1)), whatever the sizes of the paths.
--   expert_purity  the same for the experts of single layers in place of paths, averaged over the window's
--     layers: what a path tells beyond it, its order and its company tell.
-- Source: paths as units: arXiv 2603.18297, arXiv 2604.17837. Purity: Simpson 1949, Nature 163, 688, whose
--   estimate does not grow where paths are small, as the share of the most frequent id would.
-- Grain: metric, stack, layer (the window's first), rank (of the path; null for a whole window). path = its
--   experts. n = N, tokens of all labels together; of path_purity those whose path has another one. count =
--   N_p, of a window its different paths. Of a path: purity as above, token = its most frequent id, token_share
--   = that id's share of N_p. No purity where the run dropped the ids of its tokens.
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
        counted.*,
        share as value,
        markov_share as baseline,
        all_tokens as n,
        tokens as count
    from counted
    where rank is not null
    union all
    select
        'same_path' as metric,
        counted.*,
        same_path as value,
        same_markov as baseline,
        all_tokens as n,
        paths as count
    from counted
    where same_path is not null
    union all
    select
        'path_purity' as metric,
        counted.*,
        purity as value,
        all_purity as baseline,
        tokens as n,
        paths as count
    from counted
    where rank is null and purity is not null
    union all
    select
        'expert_purity' as metric,
        counted.*,
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
