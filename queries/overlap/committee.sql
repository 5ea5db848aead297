-- Question: Is there a committee, a few experts that nearly every label uses most?
-- Formula: each label has a set of its m most used experts; an expert that was never chosen is in no set,
--   ties go to the lower id. The committee are the experts in the sets of at least $share of the #D labels.
--   committee_size  its experts. Baseline: what #D random sets of m give, E times the probability that a
--     binomial of #D draws with chance m/E is $share #D or more.
--   committee_mass  share of the picks that it gets, each label with equal weight: the mean over labels of
--     N_eD / (k N_D), summed over its experts. Baseline size / E, experts that are loaded alike.
--   mean_jaccard    Jaccard index of two labels' sets, mean over all pairs; null for a single label.
--     Baseline: the expectation for random sets of the same sizes, as in language_overlap.
--   Small samples blur the sets, so that fewer experts are in most of them: read it with n.
-- Source: the standing committee of arXiv 2601.03425, which ranks the experts of a domain by their mean
--   router probability; here it is their picks that count.
-- Grain: metric, stack, layer. n = tokens of all labels, labels = #D; members = the committee's experts.
-- Reads: assignments
-- Biased: mean_jaccard
-- Example: --layer 0 --share 0.25
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
--   m integer >= 1 = null: size of the sets (default: the layer's k)
--   share double = 0.8: of the labels that need to have an expert in their set, above 0, at most 1
with load as (
    select
        *,
        least(coalesce($m, top_k), n_experts) as m,
        picks / (top_k * tokens) as pick_share,
        row_number() over (partition by stack, layer, label order by picks desc, expert asc) as place
    from label_load('assignments', $stack, $layer, $labels, $include_special)
),

ranked as (
    select
        *,
        picks > 0 and place <= m as is_top
    from load
    where
        case when $share > 0 and $share <= 1 then true else error('share is above 0 and at most 1') end
),

elected as (
    select
        stack,
        layer,
        expert,
        n_experts,
        m,
        count(*) as labels,
        sum(tokens)::bigint as n,
        avg(pick_share) as pick_share,
        count_if(is_top) / count(*) >= $share as is_member
    from ranked
    group by stack, layer, expert, n_experts, m
),

committees as (
    select
        stack,
        layer,
        n_experts,
        labels,
        n,
        m / n_experts as chance,
        count_if(is_member) as size,
        sum(if(is_member, pick_share, 0)) as mass,
        coalesce(list(expert order by expert) filter (where is_member), []) as members
    from elected
    group by stack, layer, n_experts, labels, n, m
),

tops as (
    select
        stack,
        layer,
        label,
        expert,
        n_experts,
        count(*) over (partition by stack, layer, label) as size
    from ranked
    where is_top
),

-- pairs of labels that share no expert are not here, and have an index of 0
pairs as (
    select
        a.stack,
        a.layer,
        count(*) / (a.size + b.size - count(*)) as jaccard
    from tops as a
    inner join tops as b
        on
            a.stack = b.stack
            and a.layer = b.layer
            and a.expert = b.expert
            and a.label < b.label
    group by a.stack, a.layer, a.label, b.label, a.size, b.size
),

summed as (
    select
        stack,
        layer,
        sum(jaccard) as jaccard
    from pairs
    group by stack, layer
),

sizes as (
    select
        stack,
        layer,
        n_experts,
        size,
        count(distinct label) as labels
    from tops
    group by stack, layer, n_experts, size
),

expectations as (
    select
        a.stack,
        a.layer,
        sum(
            if(a.size = b.size, a.labels * (a.labels - 1) / 2, a.labels * b.labels)
            * expected_jaccard(a.n_experts, a.size, b.size)
        ) as jaccard
    from sizes as a
    inner join sizes as b
        on
            a.stack = b.stack
            and a.layer = b.layer
            and a.size <= b.size
    group by a.stack, a.layer
),

compared as (
    select
        committees.*,
        coalesce(summed.jaccard, 0) as jaccard,
        expectations.jaccard as expected_jaccard,
        nullif(committees.labels * (committees.labels - 1) / 2, 0) as pairs
    from committees
    left join summed using (stack, layer)
    left join expectations using (stack, layer)
),

metrics as (
    select
        'committee_size' as metric,
        *,
        size as value,
        -- binomials through ln n! = lgamma(n + 1)
        n_experts * if(
            chance = 1,
            1,
            list_sum(
                list_transform(
                    range(labels + 1),
                    lambda v: if(
                        v / labels >= $share,
                        exp(
                            lgamma(labels + 1) - lgamma(v + 1) - lgamma(labels - v + 1)
                            + v * ln(chance) + (labels - v) * ln(1 - chance)
                        ),
                        0
                    )
                )
            )
        ) as baseline
    from compared
    union all
    select
        'committee_mass' as metric,
        *,
        mass as value,
        size / n_experts as baseline
    from compared
    union all
    select
        'mean_jaccard' as metric,
        *,
        jaccard / pairs as value,
        expected_jaccard / pairs as baseline
    from compared
)

select
    metric,
    stack,
    layer,
    value,
    baseline,
    n,
    labels,
    members
from metrics
order by metric, stack, layer
