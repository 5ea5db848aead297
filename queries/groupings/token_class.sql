-- Question: What kind of token is it?
-- Formula: special: the tokenizer added it, or it is a special entry of the vocabulary. Else, by its
--   characters: the script that most of its letters have, by its ISO 15924 code (Latn, Cyrl …; first by name
--   among equals); without letters digit; without digits punctuation, symbols included; other: spaces, and
--   bytes that are no whole character.
-- Groups: tokens
-- Reads: tokens, vocab, vocab_characters
-- Needs: vocab
with classes as (
    select
        token_id,
        first(
            class
            order by
                class = 'punctuation' asc, class = 'digit' asc, class = 'Zyyy' asc, characters desc, class asc
        ) as class
    from vocab_characters
    group by token_id
)

select
    tokens.shard,
    tokens.tok,
    case
        when tokens.is_special or coalesce(vocab.is_special, false) then 'special'
        else coalesce(classes.class, 'other')
    end as label
from tokens
left join vocab on tokens.token_id = vocab.token_id
left join classes on tokens.token_id = classes.token_id
