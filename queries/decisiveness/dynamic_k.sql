-- Question: How many experts carry most of a token's routing weight?
-- Formula: for each token the smallest number of experts, the largest first, that together have $mass of the
--   sum over all, to a part in a million; value = mean over N_D tokens.
--   weight_k       of the k chosen, by the weights w that the model applied; 1 … k. Baseline $mass k, rounded
--     up: what equal weights need.
--   probability_k  of all E, by p; 1 … E. Baseline $mass E, rounded up. Above k, the router spreads over more
--     experts than it may choose. Only where the run stored probabilities or logits.
-- Source: top-p routing, which chooses that many experts for a token: arXiv 2403.07652.
-- Grain: metric, stack, layer, label (null if pooled). n = N_D; shares = what share of the tokens needs 1, 2,
--   … k experts. For probability_k they may sum to less than 1: the other tokens need more than k.
-- Reads: decisions, layers
-- Needs: weights for metric weight_k; probabilities for metric probability_k
-- Example: --layer 4 --labels eng_Latn,kor_Hang
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
--   pooled boolean = false: all labels together, with label null
--   mass double = 0.9: share of the sum that the experts need to have, above 0, at most 1
with chosen as (
    select
        stack,
        layer,
        label,
        unnest(['weight_k', 'probability_k']) as metric,
        unnest([list_filter(weights, lambda w: w is not null), probabilities])::double[] as parts
    from by_label('decisions', $stack, $layer, $labels, $include_special, $pooled)
    where
        case when $mass > 0 and $mass <= 1 then true else error('mass is above 0 and at most 1') end
),

ordered as (
    select
        * exclude (parts),
        list_transform(
            list_sort(parts, 'desc'), lambda part: struct_pack(total := part, experts := 1)
        ) as largest_first,
        $mass * (1 - 1e-6) * list_sum(parts) as target
    from chosen
    where parts is not null
),

needing as (
    select
        metric,
        stack,
        layer,
        label,
        -- adds one after the other until the target is reached
        list_reduce( -- noqa: PRS
            largest_first,
            lambda sofar, next: if(
                sofar.total >= target,
                sofar,
                struct_pack(total := sofar.total + next.total, experts := sofar.experts + 1)
            )
        ).experts as experts
    from ordered
),

counted as (
    select
        metric,
        stack,
        layer,
        label,
        experts,
        count(*) as tokens
    from needing
    group by metric, stack, layer, label, experts
),

summed as (
    select
        metric,
        stack,
        layer,
        label,
        sum(experts * tokens) / sum(tokens) as value,
        sum(tokens)::bigint as n,
        map(list(experts), list(tokens)) as tokens_of
    from counted
    group by metric, stack, layer, label
),

located as (
    select
        summed.*,
        layers.top_k,
        if(summed.metric = 'weight_k', layers.top_k, layers.n_experts) as at_most
    from summed
    inner join layers using (stack, layer)
)

select
    metric,
    stack,
    layer,
    label,
    value,
    ceil($mass * (1 - 1e-6) * at_most)::integer as baseline,
    n,
    list_transform(range(1, top_k + 1), lambda needed: coalesce(tokens_of[needed], 0) / n) as shares
from located
order by metric, stack, layer, label
