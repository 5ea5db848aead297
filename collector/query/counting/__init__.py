"""Counts in numpy what a `group by` in SQL would take minutes and gigabytes for, over batches that DuckDB streams.

`rows` streams what routers decided as arrays. Each of `token_counts`, `pair_counts` and `neighbour_counts` computes the
rows of the macro of its name in `queries/macros/`, whose SQL defines them; `macros` puts them in its place for a query.
"""
