-- Question: How well does the model predict each label's text?
-- Formula: over the tokens of label D that have a predecessor in their document:
--   nats_per_token      sum of -ln p(token | those before it) / tokens. Baseline the same over all labels.
--   perplexity          exp(nats_per_token). Baseline the same over all labels.
--   bits_per_character  sum of nats / (ln 2 * characters), of documents that were not cut to the model's
--     length, so that labels with different tokens per character compare. Baseline the same over all labels.
--     Null where an encoder reads the text, and where labels are groups of tokens.
--   The first token has no prediction, but its characters count: most tokenizers start with a token of their
--   own.
-- Source: cross entropy; bits per character as in language modelling.
-- Grain: metric, stack, label. n = tokens with a prediction.
-- Reads: label_losses
-- Example: --labels eng_Latn,kor_Hang
-- Params:
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
with of_labels as (
    select
        stack,
        label,
        sum(tokens)::bigint as n,
        sum(nats) as nats,
        sum(whole_nats) as whole_nats,
        sum(characters) as characters
    from by_label('label_losses', null, null, $labels, $include_special, false)
    group by stack, label
),

everything as (
    select
        stack,
        sum(nats) / sum(tokens) as all_nats_per_token,
        sum(whole_nats) / ln(2) / nullif(sum(characters), 0) as all_bits_per_character
    from filtered('label_losses', null, null, $labels, $include_special)
    group by stack
),

pooled as (
    select
        of_labels.*,
        everything.all_nats_per_token,
        everything.all_bits_per_character
    from of_labels
    inner join everything using (stack)
),

metrics as (
    select
        'nats_per_token' as metric,
        *,
        nats / n as value,
        all_nats_per_token as baseline
    from pooled
    union all
    select
        'perplexity' as metric,
        *,
        exp(nats / n) as value,
        exp(all_nats_per_token) as baseline
    from pooled
    union all
    select
        'bits_per_character' as metric,
        *,
        whole_nats / ln(2) / nullif(characters, 0) as value,
        all_bits_per_character as baseline
    from pooled
)

select
    metric,
    stack,
    label,
    value,
    baseline,
    n
from metrics
order by metric, stack, label
