-- Question: What is this expert for: which tokens, in which contexts, labels, positions, with which others?
-- Formula: N_a = tokens that have item a, N_ae = those for which the expert was among the k chosen, N_e and N
--   of all tokens. Aspects, with their items:
--   token     a token of the vocabulary (its id where there is no vocabulary): value = N_ae / N_a.
--   label     a label: value = N_ae / N_a.
--   position  positions first-last in the document, counted from 0: value = N_ae / N_a.
--   expert    another expert, which the tokens of N_a chose: value = N_ae / N_e, P(a given the expert).
--   Baseline N_e / N, and N_a / N for the aspect expert: what items that say nothing give.
--   context   the tokens around one of the N_e, itself between ⟦ and ⟧: value = the weight that the model
--     gave the expert there, the highest of the document; baseline the mean weight over the N_e.
-- Source: counts.
-- Grain: aspect, stack, layer, expert, rank; items that the expert never had are left out. Tokens and experts
--   by N_ae, labels and contexts by value, the first $n of each; positions in their order, all. n = N_a, but
--   N_e for the aspects expert and context; count = N_ae. No tokens where the run dropped their ids, no
--   contexts where it has no vocabulary.
-- Reads: decisions, labelled_tokens, label_sets, shards
-- Needs: weights for aspect context
-- Example: --layer 4 --expert 55 --n 2
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
--   expert integer >= 0 = 0: the expert, in each layer that has it
--   n integer >= 1 = 10: items of each aspect
--   width integer >= 0 = 8: tokens of a context on each side
--   every integer >= 1 = 1: only one shard of so many, from the first on: a sample of a large run
with sampled as (
    select shard
    from shards
    where shard % $every = 0
),

decided as (
    select
        shard,
        tok,
        stack,
        layer,
        label,
        experts,
        list_contains(experts, $expert) as is_own,
        weights[list_position(experts, $expert)] as weight
    from filtered('decisions', $stack, $layer, $labels, $include_special)
    where
        shard in (select sampled.shard from sampled)
),

-- asked for again: through a join it would not reach the files of the tokens
words as (
    select
        shard,
        tok,
        doc,
        position,
        token_id,
        token,
        is_special,
        if(position = 0, 0, 2 ** floor(log2(position)))::bigint as first_position
    from labelled_tokens
    where shard in (select sampled.shard from sampled)
),

chosen as (
    select
        decided.*,
        words.doc,
        words.position,
        words.token_id,
        words.token,
        words.first_position
    from decided
    inner join words using (shard, tok)
),

totals as (
    select
        stack,
        layer,
        count(*) as tokens,
        count_if(is_own) as own,
        avg(weight) as mean_weight
    from chosen
    group by stack, layer
),

by_token as (
    select
        stack,
        layer,
        token_id as number,
        any_value(token) as token,
        count(*) as n,
        count_if(is_own) as own
    from chosen
    where token_id is not null
    group by stack, layer, token_id
),

labelled as (
    select
        chosen.stack,
        chosen.layer,
        chosen.is_own,
        coalesce(label_sets.label, chosen.label) as item
    from chosen
    left join label_sets on chosen.label = label_sets.label_set
),

by_label as (
    select
        stack,
        layer,
        item,
        count(*) as n,
        count_if(is_own) as own
    from labelled
    where $labels is null or list_contains($labels, item)
    group by stack, layer, item
),

by_position as (
    select
        stack,
        layer,
        first_position as number,
        count(*) as n,
        count_if(is_own) as own
    from chosen
    group by stack, layer, first_position
),

picked as (
    select
        stack,
        layer,
        is_own,
        unnest(experts) as number
    from chosen
),

by_expert as (
    select
        stack,
        layer,
        number,
        count(*) as n,
        count_if(is_own) as own
    from picked
    where
        number is not null
        and number != $expert
    group by stack, layer, number
),

strongest as (
    select
        *,
        row_number() over (partition by stack, layer, shard, doc order by weight desc, position asc) as place
    from chosen
    where is_own and token is not null
),

centres as (
    select *
    from strongest
    where place = 1
    qualify row_number() over (partition by stack, layer order by weight desc, shard asc, tok asc) <= $n
),

-- as far apart in the tokens table as in the document: a document's tokens of the other stack are not
by_context as (
    select
        centres.stack,
        centres.layer,
        centres.weight,
        centres.shard,
        centres.tok,
        string_agg(
            if(around.tok = centres.tok, '⟦' || around.token || '⟧', around.token), ''
            order by around.position
        ) as item
    from centres
    inner join words as around
        on
            centres.shard = around.shard
            and centres.doc = around.doc
            and around.tok::bigint - centres.tok = around.position::bigint - centres.position
            and abs(around.position::bigint - centres.position) <= $width -- noqa: RF02
    where around.tok = centres.tok or $include_special or not around.is_special -- noqa: RF02
    group by centres.stack, centres.layer, centres.weight, centres.shard, centres.tok
),

-- sorted within an aspect by the two columns `first_by`, which is what ranks it, and `then_by`
items as (
    select
        'token' as aspect,
        stack,
        layer,
        coalesce(token, number::varchar) as item,
        -own as first_by,
        number as then_by,
        n,
        own
    from by_token
    union all
    select
        'label' as aspect,
        stack,
        layer,
        item,
        -own / n as first_by,
        row_number() over (order by item) as then_by,
        n,
        own
    from by_label
    union all
    select
        'position' as aspect,
        stack,
        layer,
        if(number < 2, number::varchar, format('{}-{}', number, 2 * number - 1)) as item,
        number as first_by,
        0 as then_by,
        n,
        own
    from by_position
    union all
    select
        'expert' as aspect,
        stack,
        layer,
        number::varchar as item,
        -own as first_by,
        number as then_by,
        n,
        own
    from by_expert
    union all
    select
        'context' as aspect,
        stack,
        layer,
        item,
        -weight as first_by,
        row_number() over (order by shard, tok) as then_by,
        null as n,
        1 as own
    from by_context
),

ranked as (
    select
        *,
        $expert::integer as expert,
        row_number() over (partition by aspect, stack, layer order by first_by asc, then_by asc) as rank
    from items
    where own > 0
)

select
    ranked.aspect,
    ranked.stack,
    ranked.layer,
    ranked.expert,
    ranked.rank,
    ranked.item,
    case ranked.aspect
        when 'context' then -ranked.first_by
        when 'expert' then ranked.own / totals.own
        else ranked.own / ranked.n
    end as value,
    case ranked.aspect
        when 'context' then totals.mean_weight
        when 'expert' then ranked.n / totals.tokens
        else totals.own / totals.tokens
    end as baseline,
    if(ranked.aspect in ('context', 'expert'), totals.own, ranked.n) as n,
    ranked.own as count
from ranked
inner join totals using (stack, layer)
where ranked.aspect = 'position' or ranked.rank <= $n
order by ranked.aspect, ranked.stack, ranked.layer, ranked.rank
