-- Question: What does the label say about the experts beyond what the tokens themselves say?
-- Formula: x = token id, N_xD = its occurrences in label D, N_xDe = those for which e was among the k chosen.
--   Every label counts alike: P(x,D) = N_xD / (#D N_D) and P(x,D,e) = P(x,D) N_xDe / (k N_xD).
--   conditional_mutual_information             I(e;D|x) = sum of P(x,D,e) log2(P(e|x,D) / P(e|x)), in bits.
--   normalized_conditional_mutual_information  I(e;D|x) / H(D|x), 0 … 1; null where no id has two labels.
--   With the same weights I(e;x,D) = I(e;x) + I(e;D|x). An id that only one label has adds nothing:
--   shared = P of the ids that several labels have; where it is small, so must be the value.
--   Most ids are rare, so this plain estimate is far too high. Baseline: the same estimate after the labels
--   were shuffled among the occurrences of each id (one draw), which keeps every N_xD, so that it has the
--   same bias where labels say nothing. Read value - baseline. It takes tokens for independent, which those
--   of a document are not: part of the difference may be the topics of single documents.
-- Source: conditional mutual information with a permutation baseline; ours.
-- Grain: metric, stack, layer. n = tokens of all labels, labels = #D. No rows where the run dropped the ids
--   of its tokens.
-- Reads: decisions, labelled_tokens, label_sets, layers
-- Example: --layer 4
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
--   seed integer = 0: of the shuffle
with expanded as (
    select
        labelled_tokens.shard,
        labelled_tokens.tok,
        labelled_tokens.stack,
        labelled_tokens.token_id,
        labelled_tokens.is_special,
        coalesce(label_sets.label, labelled_tokens.label) as label
    from labelled_tokens
    left join label_sets on labelled_tokens.label = label_sets.label_set
),

labelled as (
    select
        shard,
        tok,
        stack,
        token_id,
        label,
        hash(shard, tok, $seed) as lot
    from expanded
    where
        token_id is not null
        and ($labels is null or list_contains($labels, label))
        and ($include_special or not is_special)
),

-- weight = what a token of the label adds to P; it is the same for all routers of a stack's tokens
sizes as (
    select
        stack,
        label,
        count(*) as tokens,
        1 / (count(*) * count(*) over (partition by stack)) as weight,
        (row_number() over (partition by stack order by label))::integer as number
    from labelled
    group by stack, label
),

ids_by_label as (
    select
        labelled.stack,
        labelled.token_id,
        labelled.label,
        sum(sizes.weight) as p
    from labelled
    inner join sizes using (stack, label)
    group by labelled.stack, labelled.token_id, labelled.label
),

ids as (
    select
        stack,
        token_id,
        sum(p) as p,
        sum(p * log2(p)) as plogp_by_label
    from ids_by_label
    group by stack, token_id
    having count(*) > 1
),

-- I(e;D|x) = H(x,D) + H(x,e) - H(x) - H(x,D,e); H is minus the sum of p log2 p, over the shared ids alone,
-- because in all others the four cancel
of_ids as (
    select
        stack,
        sum(p) as shared,
        sum(p * log2(p)) as plogp_x,
        sum(plogp_by_label) as plogp_xd
    from ids
    group by stack
),

drawn as (
    select
        labelled.*,
        row_number() over (
            partition by labelled.stack, labelled.token_id
            order by labelled.shard, labelled.tok, labelled.label
        ) as place,
        row_number() over (
            partition by labelled.stack, labelled.token_id
            order by labelled.lot, labelled.shard, labelled.tok, labelled.label
        ) as draw
    from labelled
    inner join ids using (stack, token_id)
),

shuffled as (
    select
        own.shard,
        own.tok,
        own.token_id,
        [own_size.number, other_size.number] as labels,
        [own_size.weight, other_size.weight] as weights
    from drawn as own
    inner join drawn as other
        on
            own.stack = other.stack
            and own.token_id = other.token_id
            and own.place = other.draw
    inner join sizes as own_size
        on own.stack = own_size.stack and own.label = own_size.label
    inner join sizes as other_size
        on other.stack = other_size.stack and other.label = other_size.label
),

chosen as (
    select
        shard,
        stack,
        layer,
        tok,
        experts
    from filtered('decisions', $stack, $layer, null, true)
),

-- every decision twice, with its label (place 1) and with a shuffled one (place 2)
labelled_twice as (
    select
        shuffled.shard,
        shuffled.tok,
        shuffled.token_id,
        places.place,
        shuffled.labels[places.place] as label,
        shuffled.weights[places.place] as weight
    from shuffled
    cross join (values (1), (2)) as places (place)
),

assigned as (
    select
        chosen.stack,
        chosen.layer,
        labelled_twice.token_id,
        labelled_twice.place,
        labelled_twice.label,
        labelled_twice.weight,
        unnest(chosen.experts) as expert
    from chosen
    inner join labelled_twice using (shard, tok)
),

cells as (
    select
        assigned.place,
        assigned.stack,
        assigned.layer,
        assigned.token_id,
        assigned.expert,
        sum(assigned.weight) / layers.top_k as p
    from assigned
    inner join layers using (stack, layer)
    where assigned.expert is not null
    group by
        assigned.place, assigned.stack, assigned.layer, assigned.token_id, assigned.expert,
        assigned.label, layers.top_k
),

cells_of_experts as (
    select
        place,
        stack,
        layer,
        sum(p) as p,
        sum(p * log2(p)) as plogp_by_label
    from cells
    group by place, stack, layer, token_id, expert
),

of_experts as (
    select
        place,
        stack,
        layer,
        sum(plogp_by_label) - sum(p * log2(p)) as plogp
    from cells_of_experts
    group by place, stack, layer
),

measured as (
    select
        layers.stack,
        layers.layer,
        sum(sizes.tokens)::bigint as n,
        count(*) as labels,
        any_value(of_ids.shared) as shared,
        any_value(of_ids.plogp_x - of_ids.plogp_xd) as label_bits,
        any_value(own.plogp) + any_value(of_ids.plogp_x - of_ids.plogp_xd) as bits,
        any_value(other.plogp) + any_value(of_ids.plogp_x - of_ids.plogp_xd) as shuffled_bits
    from layers
    inner join sizes on split_part(layers.stack, '.', 1) = sizes.stack
    left join of_ids on sizes.stack = of_ids.stack
    left join of_experts as own
        on layers.stack = own.stack and layers.layer = own.layer and own.place = 1
    left join of_experts as other
        on layers.stack = other.stack and layers.layer = other.layer and other.place = 2
    group by layers.stack, layers.layer
),

metrics as (
    select
        'conditional_mutual_information' as metric,
        *,
        1 as unit
    from measured
    union all
    select
        'normalized_conditional_mutual_information' as metric,
        *,
        label_bits as unit
    from measured
)

select
    metric,
    stack,
    layer,
    greatest(coalesce(bits, 0), 0) / unit as value,
    greatest(coalesce(shuffled_bits, 0), 0) / unit as baseline,
    n,
    labels,
    coalesce(shared, 0) as shared
from metrics
where
    ($stack is null or stack = $stack)
    and ($layer is null or layer = $layer)
order by metric, stack, layer
