-- Question: Which experts write the layer's output for one label more than for others?
-- Formula: domain_specialization with what experts add in place of how often they are chosen: c = max(0, sum
--   of <g f, y> / |y|^2) / N_D, the contribution per token (see expert_contribution). value = c. Baseline
--   1/E.
--   exclusivity  c(e, D) / sum of c(e, D') over the labels; exclusivity_baseline 1 / number of labels.
--   lift         c(e, D) / e's mean c over the labels, each label with equal weight; 1 = no preference. Both
--   are null for an expert that adds to no label's output.
--   With $labels given, exclusivity and lift compare those labels only.
-- Source: OLMoE, arXiv 2409.02060, section 5, of contributions, which are ours.
-- Grain: metric, stack, layer, label, expert; every expert of the layer. n = N_D; picks = those computed.
-- Reads: assignments, label_outputs
-- Example: --layer 4 --labels heb_Hebr,kor_Hang
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
with effects as (
    select
        stack,
        layer,
        label,
        expert,
        n_experts,
        tokens,
        picks,
        greatest(contribution, 0) / tokens as c
    from label_effects('label_outputs', 'assignments', $stack, $layer, $labels, $include_special, false)
),

compared as (
    select
        *,
        sum(c) over (partition by stack, layer, expert) as c_total,
        count(*) over (partition by stack, layer, expert) as label_count
    from effects
)

select
    'contribution_specialization' as metric,
    stack,
    layer,
    label,
    expert,
    c as value,
    1 / n_experts as baseline,
    tokens as n,
    picks::bigint as picks,
    c / nullif(c_total, 0) as exclusivity,
    1 / label_count as exclusivity_baseline,
    c * label_count / nullif(c_total, 0) as lift
from compared
order by stack, layer, label, expert
