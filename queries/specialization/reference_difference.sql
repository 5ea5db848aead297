-- Question: Which experts does a label use more, or less, than a reference label?
-- Formula: value = f_D - f_ref, with f = N_eD / N_D, the share of a label's tokens for which e was among
--   the k chosen; -1 … 1, sums to 0 over the experts. Baseline 0, the same use.
-- Source: difference to English in multilingual routing, arXiv 2510.04694.
-- Grain: metric, stack, layer, label, expert; every expert of the layer, every label but the reference. n =
--   the smaller of N_D and reference_tokens, the tokens of the two labels.
-- Reads: assignments, labels
-- Example: --layer 4 --labels kor_Hang --reference eng_Latn
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
--   reference varchar = null: label to compare with, whether or not `labels` names it (default: the label
--     with the most tokens in this run, the first by name among equals)
with sizes as (
    select
        label,
        row_number() over (order by tokens desc, label asc) as place
    from labels
),

reference_label as (
    select coalesce($reference, min(label) filter (where place = 1)) as label
    from sizes
),

load as (
    select *
    from label_load(
        'assignments',
        $stack,
        $layer,
        if($labels is null, null, list_append($labels, (select reference_label.label from reference_label))),
        $include_special
    )
)

select
    'reference_difference' as metric,
    load.stack,
    load.layer,
    load.label,
    load.expert,
    load.frequency - base.frequency as value,
    0 as baseline,
    least(load.tokens, base.tokens) as n,
    load.frequency,
    base.label as reference,
    base.frequency as reference_frequency,
    base.tokens as reference_tokens
from load
inner join load as base
    on
        load.stack = base.stack
        and load.layer = base.layer
        and load.expert = base.expert
        and load.label != base.label
where base.label = (select reference_label.label from reference_label)
order by load.stack, load.layer, load.label, load.expert
