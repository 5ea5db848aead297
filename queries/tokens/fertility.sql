-- Question: How many tokens does the tokenizer need for each label's text, and how much text is there?
-- Formula: over the documents of the label that were not truncated:
--   tokens_per_character  tokens / characters (fertility). characters_per_token is its inverse.
--   tokens_per_document   tokens / documents.
--   Baseline the same over all labels together.
--   documents             all documents. Baseline their mean over the labels.
--   truncated_share       documents that were cut to the model's length / documents. Baseline all labels.
--   A label with more tokens per character has shorter tokens, which by itself changes the experts that are
--   chosen: compare labels of similar fertility, or see conditional_mutual_information.
-- Source: tokenizer fertility, per character because words are not marked in every script.
-- Grain: metric, label. n = documents that value counts; documents without a token to count are in none.
--   tokens and characters are those of the documents that were not truncated. The text is what the encoder
--   reads of an encoder-decoder model.
-- Reads: labelled_tokens, label_sets
-- Needs: characters for metric tokens_per_character, characters_per_token; characters for column
--   characters
-- Example: --labels eng_Latn,kor_Hang
-- Params:
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
with stacks as (
    select max(stack) as stack
    from labelled_tokens
),

texts as (
    select
        shard,
        doc,
        label,
        characters,
        truncated,
        count(*) as tokens
    from labelled_tokens
    where
        ($labels is null or list_contains($labels, label))
        and ($include_special or not is_special)
        -- the encoder's where there are two
        and stack = (select stacks.stack from stacks)
    group by shard, doc, label, characters, truncated
),

counted as (
    select
        label,
        count(*) as documents,
        count_if(truncated) as truncated,
        count_if(not truncated) as whole,
        coalesce(sum(tokens) filter (where not truncated), 0)::bigint as tokens,
        coalesce(sum(characters) filter (where not truncated), 0)::bigint as characters
    from texts
    group by label
),

-- all labels together, each document once
everything as (
    select
        sum(documents) as all_documents,
        sum(truncated) as all_truncated,
        sum(whole) as all_whole,
        sum(tokens) as all_tokens,
        sum(characters) as all_characters
    from counted
),

labelled as (
    select counted.* replace (coalesce(label_sets.label, counted.label) as label)
    from counted
    left join label_sets on counted.label = label_sets.label_set
),

of_labels as (
    select
        label,
        sum(documents)::bigint as documents,
        sum(truncated)::bigint as truncated,
        sum(whole)::bigint as whole,
        sum(tokens)::bigint as tokens,
        sum(characters)::bigint as characters
    from labelled
    where $labels is null or list_contains($labels, label)
    group by label
),

pooled as (
    select
        of_labels.*,
        everything.*,
        count(*) over () as labels
    from of_labels
    cross join everything
),

metrics as (
    select
        'tokens_per_character' as metric,
        *,
        tokens / nullif(characters, 0) as value,
        all_tokens / nullif(all_characters, 0) as baseline,
        whole as n
    from pooled
    union all
    select
        'characters_per_token' as metric,
        *,
        characters / nullif(tokens, 0) as value,
        all_characters / nullif(all_tokens, 0) as baseline,
        whole as n
    from pooled
    union all
    select
        'tokens_per_document' as metric,
        *,
        tokens / nullif(whole, 0) as value,
        all_tokens / nullif(all_whole, 0) as baseline,
        whole as n
    from pooled
    union all
    select
        'documents' as metric,
        *,
        documents as value,
        all_documents / labels as baseline,
        documents as n
    from pooled
    union all
    select
        'truncated_share' as metric,
        *,
        truncated / documents as value,
        all_truncated / all_documents as baseline,
        documents as n
    from pooled
)

select
    metric,
    label,
    value,
    baseline,
    n,
    tokens,
    characters
from metrics
order by metric, label
