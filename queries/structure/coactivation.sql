-- Question: Which experts are chosen together?
-- Formula: N_i = tokens for which i was among the k chosen.
--   paper     P(j given i) = N_ij / N_i, N_ij = tokens for which i and j both were. Sums to k - 1 over j.
--     Baseline (k - 1) / (E - 1): k experts drawn at random.
--   released  N_ij counts only neighbours in the order of weights, highest first (ties: the model's own
--     order), as OLMoE's released script does. Baseline 2 (k - 1) / (k (E - 1)).
-- Source: expert co-activation of OLMoE, arXiv 2409.02060, section 5.
-- Grain: metric, stack, layer, expert (i), other_expert (j), both orders of each pair that was chosen
--   together at all. n = N_i, tokens of all labels together.
-- Reads: decisions, layers
-- Needs: weights for mode released
-- Example: --layer 4
-- Params:
--   stack varchar = null: only the routers of this stack, as `layers` names it (default: all)
--   layer integer = null: only this layer, by the model's own number (default: all)
--   labels varchar[] = null: only these labels (default: all)
--   include_special boolean = false: also count the tokens that the tokenizer added itself (BOS, EOS,
--     language codes); they say nothing about the text
--   mode varchar = paper: paper, or released
with counted as (
    select *
    from pair_counts('decisions', $stack, $layer, $labels, $include_special, $mode = 'released')
    where
        case when $mode in ('paper', 'released') then true else error('mode takes paper or released') end
)

select
    if($mode = 'paper', 'coactivation', 'adjacent_coactivation') as metric,
    counted.stack,
    counted.layer,
    counted.expert,
    counted.other_expert,
    counted.together / counted.picks as value,
    (layers.top_k - 1) / (layers.n_experts - 1) * if($mode = 'paper', 1, 2 / layers.top_k) as baseline,
    counted.picks as n,
    counted.together as count
from counted
inner join layers using (stack, layer)
order by metric, counted.stack, counted.layer, counted.expert, counted.other_expert
