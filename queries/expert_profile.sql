-- Question: What is this expert for: which tokens, labels, positions, and with which other experts?
-- Formula: N_a = tokens that have item a, N_ae = those for which the expert was among the k chosen, N_e and N
--   of all tokens. Aspects, with their items:
--   token     a token of the vocabulary (its id where there is no vocabulary): value = N_ae / N_a.
--   label     a label: value = N_ae / N_a.
--   position  positions first-last in the document, counted from 0: value = N_ae / N_a.
--   expert    another expert, which the tokens of N_a chose: value = N_ae / N_e, P(a given the expert).
--   Baseline N_e / N, and N_a / N for the aspect expert: what items that say nothing give.
-- Source: counts.
-- Grain: aspect, stack, layer, expert, rank; items that the expert never had are left out. Tokens and experts
--   by N_ae, labels by value, the first $n of each; positions in their order, all. n = N_a, but N_e for the
--   aspect expert; count = N_ae. No tokens where the run dropped their ids.
-- Reads: decisions, labelled_tokens, shards
-- Example: --layer 4 --expert 55 --n 2
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
--   expert integer >= 0 = 0: the expert, in each layer that has it
--   n integer >= 1 = 10: items of each aspect
--   every integer >= 1 = 1: only one shard of so many, from the first on: a sample of a large run
with sampled as (
    select shard
    from shards
    where shard % $every = 0
),

decided as (
    select
        shard,
        stack,
        layer,
        tok,
        label,
        experts,
        list_contains(experts, $expert) as is_own
    from decisions
    where
        ($stack is null or stack = $stack)
        and ($layer is null or layer = $layer)
        and ($labels is null or list_contains($labels, label))
        and ($include_special or not is_special)
        and shard in (select sampled.shard from sampled)
),

-- asked for again: through the join it would not reach the files of the tokens
words as (
    select
        shard,
        tok,
        token_id,
        token,
        if(position = 0, 0, 2 ** floor(log2(position)))::bigint as first_position
    from labelled_tokens
    where shard in (select sampled.shard from sampled)
),

chosen as (
    select
        decided.*,
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
        count_if(is_own) as own
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

by_label as (
    select
        stack,
        layer,
        label as item,
        count(*) as n,
        count_if(is_own) as own
    from chosen
    group by stack, layer, label
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
    ranked.own / if(ranked.aspect = 'expert', totals.own, ranked.n) as value,
    if(ranked.aspect = 'expert', ranked.n, totals.own) / totals.tokens as baseline,
    if(ranked.aspect = 'expert', totals.own, ranked.n) as n,
    ranked.own as count
from ranked
inner join totals using (stack, layer)
where ranked.aspect = 'position' or ranked.rank <= $n
order by ranked.aspect, ranked.stack, ranked.layer, ranked.rank
