-- Question: What do the outputs of each expert add up to over each label's tokens?
-- Formula: the columns are sums of the lists of `document_outputs`.
-- Grain: one row per (stack, layer, label, is_special, expert), for experts that computed anything.
-- Reads: document_outputs
-- Needs: outputs
-- Groups: documents
with picked as (
    select
        stack,
        layer,
        label,
        is_special,
        unnest(experts) as expert,
        unnest(picks) as picks,
        unnest(weight_sums) as weight_sum,
        unnest(norms) as norm,
        unnest(squared_norms) as squared_norm,
        unnest(weighted_norms) as weighted_norm,
        unnest(squared_weighted_norms) as squared_weighted_norm,
        unnest(contributions) as contribution
    from document_outputs
)

select
    stack,
    layer,
    label,
    is_special,
    expert::integer as expert,
    sum(picks)::bigint as picks,
    sum(weight_sum::double) as weight_sum,
    sum(norm::double) as norm,
    sum(squared_norm::double) as squared_norm,
    sum(weighted_norm::double) as weighted_norm,
    sum(squared_weighted_norm::double) as squared_weighted_norm,
    sum(contribution::double) as contribution
from picked
group by stack, layer, label, is_special, expert
