-- Question: In which script is the document written?
-- Formula: the one that most letters of its tokens have, by its ISO 15924 code (first by name among equals):
--   of its text, which the encoder reads of an encoder-decoder model. Japanese is Hira, Kana or Hani,
--   whichever has most. Zyyy where no token has a letter of any.
-- Groups: documents
-- Reads: recorded_documents, tokens, vocab, vocab_characters
-- Needs: vocab
with stacks as (
    select max(stack) as stack
    from tokens
),

letters as (
    select
        tokens.shard,
        tokens.doc,
        vocab_characters.class as script,
        sum(vocab_characters.characters) as letters
    from tokens
    inner join vocab using (token_id)
    inner join vocab_characters using (token_id)
    where
        not tokens.is_special
        and not vocab.is_special
        and vocab_characters.class not in ('digit', 'punctuation', 'Zyyy')
        and tokens.stack = (select stacks.stack from stacks)
    group by tokens.shard, tokens.doc, vocab_characters.class
),

dominant as (
    select
        shard,
        doc,
        first(script order by letters desc, script asc) as script
    from letters
    group by shard, doc
)

select
    recorded_documents.shard,
    recorded_documents.doc,
    coalesce(dominant.script, 'Zyyy') as label
from recorded_documents
left join dominant using (shard, doc)
