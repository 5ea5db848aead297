"""The explorer of a run: a local web app that calls the queries of `queries/` and shows what they answer.

The app is `notebooks/explore.py`, in marimo; `serving` starts it. Here is what the app is made of: `views` asks the run
and writes HTML, `panel` is the part of the page whose tokens and experts can be chosen. No number is computed here.
"""
