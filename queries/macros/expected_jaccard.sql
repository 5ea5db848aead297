-- Question: How much do two sets of experts overlap that are drawn at random?
-- Formula: the expected Jaccard index of two independent uniform subsets of e experts, of sizes a and
--   b, at least 1, with a hypergeometric intersection i: sum over i of
--   i / (a + b - i) * C(a, i) C(e - a, b - i) / C(e, b).
-- Grain: a number.
create or replace macro expected_jaccard(e, a, b) as (
    with intersections as (
        select unnest(range(greatest(a + b - e, 0), least(a, b) + 1)) as i
    )

    select
        -- ln n! = lgamma(n + 1)
        sum(
            i / (a + b - i)
            * exp(
                lgamma(a + 1) + lgamma(e - a + 1) + lgamma(b + 1) + lgamma(e - b + 1)
                - lgamma(i + 1) - lgamma(a - i + 1) - lgamma(b - i + 1) - lgamma(e - a - b + i + 1)
                - lgamma(e + 1)
            )
        )
    from intersections
)
