-- Question: How do the outputs of a layer's experts lie to each other?
-- Formula: x, y = place of what the expert put out for a sampled token, divided by its norm, in the plane of
--   `method`: umap, tsne, or pca, the two principal components, which are there beside the others.
--   trustworthiness = 1 less a penalty for neighbours in the plane that are none among the outputs, by how
--   far they are in rank; of 15 neighbours, over the whole map. Baseline 1/2 for points placed at random.
--   Distances and sizes of clusters mean little in umap and tsne. label may be a group of tokens: --by
--   token_class colours them by kind.
-- Source: UMAP: McInnes et al. 2018, arXiv 1802.03426; t-SNE: van der Maaten and Hinton 2008;
--   trustworthiness: Venna and Kaski 2001.
-- Grain: method, stack, layer, expert, shard, tok. n = points of the map, which are picks of sampled tokens.
-- Reads: maps, labelled_tokens
-- Example: --layer 4 --method pca
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   expert integer = null: only this expert (default: all)
--   method varchar = null: umap, tsne or pca (default: all that were made)
with placed as (
    select
        *,
        count(*) over (partition by method, stack, layer) as n
    from maps
),

labelled as (
    select
        placed.*,
        labelled_tokens.label,
        labelled_tokens.token
    from placed
    inner join labelled_tokens using (shard, tok)
)

select
    method,
    stack,
    layer,
    expert,
    shard,
    tok,
    label,
    token,
    x,
    y,
    trustworthiness,
    n,
    seed
from labelled
where
    ($stack is null or stack = $stack)
    and ($layer is null or layer = $layer)
    and ($labels is null or list_contains($labels, label))
    and ($expert is null or expert = $expert)
    and ($method is null or method = $method)
order by method, stack, layer, expert, shard, tok
