"""The explorer of a run: a local web app that runs the queries of `queries/` and shows their answers.

The app itself is `notebooks/explore.py`, in marimo; `serving` starts it. This package contains its parts: `views` runs
queries and writes HTML, `panel` is the part of the page with selectable tokens and experts, and `advice` suggests a
rollup for large runs. No metric is computed here.
"""
