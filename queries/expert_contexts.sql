-- Question: Where did this expert get its highest weights, and what stood around it?
-- Formula: of each token of the vocabulary the pick of the expert with the highest weight w_e (ties: the
--   first by shard and place in it); before, after = the spellings of up to $around tokens of the same
--   document on each side, null at its ends, with #id for what the vocabulary lacks. weight = w_e as the
--   model applied it.
-- Source: the recorded decisions; text is not needed, the ids of the tokens are.
-- Grain: stack, layer, expert, rank from 1 to $n; by weight, then by shard and place in it. No rows where the
--   run dropped the ids of its tokens.
-- Reads: decisions, labelled_tokens, shards
-- Example: --layer 4 --expert 55 --n 3 --around 4
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
--   expert integer >= 0 = 0: the expert, in each layer that has it
--   n integer >= 1 = 10: contexts of each layer
--   around integer >= 0 = 8: tokens on each side
--   every integer >= 1 = 1: only one shard of so many, from the first on: a sample of a large run
with sampled as (
    select shard
    from shards
    where shard % $every = 0
),

picked as (
    select
        shard,
        stack,
        layer,
        tok,
        label,
        weights[list_position(experts, $expert)] as weight
    from decisions
    where
        ($stack is null or stack = $stack)
        and ($layer is null or layer = $layer)
        and ($labels is null or list_contains($labels, label))
        and ($include_special or not is_special)
        and list_contains(experts, $expert)
        and shard in (select sampled.shard from sampled)
),

-- asked for again: through the joins it would not reach the files of the tokens
words as (
    select
        shard,
        stack as token_stack,
        tok,
        doc,
        doc_id,
        position,
        token_id,
        coalesce(token, '#' || token_id) as spelling
    from labelled_tokens
    where shard in (select sampled.shard from sampled)
),

placed as (
    select
        picked.*,
        words.token_stack,
        words.doc,
        words.position,
        words.token_id
    from picked
    inner join words using (shard, tok)
    where words.token_id is not null
),

best as (
    select
        *,
        row_number() over (
            partition by stack, layer, token_id order by weight desc, shard asc, tok asc
        ) as place
    from placed
    qualify place = 1
),

ranked as (
    select
        *,
        tok::bigint - $around as first_tok,
        tok::bigint + $around as last_tok,
        row_number() over (partition by stack, layer order by weight desc, shard asc, tok asc) as rank
    from best
    qualify rank <= $n
),

spelled as (
    select
        ranked.*,
        words.doc_id,
        words.spelling,
        words.tok - ranked.tok::bigint as distance
    from ranked
    inner join words
        on
            ranked.shard = words.shard
            and ranked.doc = words.doc
            and ranked.token_stack = words.token_stack
            and words.tok between ranked.first_tok and ranked.last_tok
)

select
    stack,
    layer,
    $expert::integer as expert,
    rank,
    doc_id as document,
    position,
    label,
    weight,
    string_agg(spelling, '' order by distance) filter (where distance < 0) as before,
    any_value(spelling) filter (where distance = 0) as token,
    string_agg(spelling, '' order by distance) filter (where distance > 0) as after
from spelled
group by stack, layer, rank, doc_id, position, label, weight
order by stack, layer, rank
